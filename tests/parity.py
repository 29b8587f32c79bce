"""Compare pictures with those of diffusers, and check that a wrong ingredient would be noticed."""

from __future__ import annotations

from typing import Any

import numpy as np

from tiny.oracle import picture_distance

MAX_LEVELS, MEAN_LEVELS = 2, 0.1
"""Largest and mean allowed difference of uint8 pictures, in levels of 255."""
NOTICEABLE = 3.0
"""Mean difference, in levels of 255, above which a wrong ingredient counts as noticed."""


def assert_same(result: Any, expected: np.ndarray) -> None:
    """Assert that the pictures in `result` equal the `expected` ones of diffusers."""
    largest, mean = picture_distance(np.stack([np.asarray(image) for image in result.images]), expected)
    assert largest <= MAX_LEVELS, f"pictures differ by {largest} levels (mean {mean:.3f})"
    assert mean <= MEAN_LEVELS, f"pictures differ by {mean:.3f} levels on average"


def assert_different(result: Any, other: Any) -> None:
    """Assert that two results differ clearly; each is one of the server or pictures of diffusers."""
    pictures = [np.stack([np.asarray(image) for image in getattr(r, "images", r)]) for r in (result, other)]
    mean = picture_distance(*pictures)[1]
    assert mean >= NOTICEABLE, f"pictures differ by only {mean:.3f} levels: the ingredient has no effect"
