"""The same picture as diffusers: how tests say it, and how they make sure that they could tell a difference."""

from __future__ import annotations

from typing import Any

import numpy as np

from tiny.oracle import picture_distance

MAX_LEVELS, MEAN_LEVELS = 2, 0.1
"""Largest and mean difference of uint8 pictures, in levels of 255."""
NOTICEABLE = 3.0
"""Mean difference from which a wrong ingredient counts as noticed, in levels."""


def assert_same(result: Any, expected: np.ndarray) -> None:
    """`result` of the server shows the pictures of the oracle."""
    largest, mean = picture_distance(np.stack([np.asarray(image) for image in result.images]), expected)
    assert largest <= MAX_LEVELS, f"pictures differ by {largest} levels (mean {mean:.3f})"
    assert mean <= MEAN_LEVELS, f"pictures differ by {mean:.3f} levels on average"


def assert_different(result: Any, other: Any) -> None:
    """Two results of the server, or one and the oracle's, are far apart."""
    pictures = [np.stack([np.asarray(image) for image in getattr(r, "images", r)]) for r in (result, other)]
    mean = picture_distance(*pictures)[1]
    assert mean >= NOTICEABLE, f"pictures differ by {mean:.3f} levels only: the ingredient has no effect"
