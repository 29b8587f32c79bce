"""Assert that pictures match diffusers, and that a wrong input would be noticed."""

from __future__ import annotations

from typing import Any

import numpy as np

from tiny.oracle import picture_distance

MAX_LEVELS, MEAN_LEVELS = 2, 0.1
"""Allowed maximum and mean difference of uint8 pictures, in levels of 255."""
TELLABLE = 3.0
"""Smallest mean difference, in levels, at which pictures count as different."""


def assert_same(result: Any, expected: np.ndarray) -> None:
    """Assert that a result of the server equals the pictures of the oracle."""
    largest, mean = picture_distance(np.stack([np.asarray(image) for image in result.images]), expected)
    assert largest <= MAX_LEVELS, f"pictures differ by {largest} levels (mean {mean:.3f})"
    assert mean <= MEAN_LEVELS, f"pictures differ by {mean:.3f} levels on average"


def assert_different(result: Any, other: Any) -> None:
    """Assert that two results of the server, or a result and pictures of the oracle, clearly differ."""
    pictures = [np.stack([np.asarray(image) for image in getattr(r, "images", r)]) for r in (result, other)]
    mean = picture_distance(*pictures)[1]
    assert mean >= TELLABLE, f"pictures differ by only {mean:.3f} levels: the input has no effect"
