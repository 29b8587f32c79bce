"""Percentiles with their uncertainty, stability of a series, and arrival times: pure functions of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

PERCENTILES = (50, 90, 99)
RESAMPLES = 2000
CONFIDENCE = 0.95
WINDOWS = 3
STABLE_WITHIN = 0.10
"""Medians of the last windows of a series that differ by more than this share are not those of a steady state."""


class Estimate(NamedTuple):
    """A value and the interval that holds it with a probability of ``CONFIDENCE``."""

    value: float
    low: float
    high: float


def percentile(samples: Sequence[float], q: float, *, seed: int = 0) -> Estimate:
    """Percentile ``q`` (0 to 100) of ``samples``, with a bootstrap interval (percentile method, Efron 1979)."""
    values = np.asarray(samples, np.float64)
    draws = np.random.default_rng(seed).choice(values, (RESAMPLES, len(values)))
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(np.percentile(draws, q, axis=1), [tail, 100 - tail])
    return Estimate(float(np.percentile(values, q)), float(low), float(high))


def ratio(samples: Sequence[float], reference: Sequence[float], *, seed: int = 0) -> Estimate:
    """Median of ``samples`` over that of ``reference``, with a bootstrap interval."""
    generator = np.random.default_rng(seed)
    medians = [
        np.median(generator.choice(np.asarray(values), (RESAMPLES, len(values))), axis=1)
        for values in (samples, reference)
    ]
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(medians[0] / medians[1], [tail, 100 - tail])
    return Estimate(float(np.median(samples) / np.median(reference)), float(low), float(high))


def spread(series: Sequence[float], windows: int = WINDOWS) -> float | None:
    """Largest over smallest median of ``windows`` equal parts of ``series``, less one; None when it is shorter.

    What does not fit into equal parts is left out at the beginning, where a series warms up.
    """
    length = len(series) // windows
    if not length:
        return None
    recent = np.asarray(series[len(series) - windows * length :]).reshape(windows, length)
    medians = np.median(recent, axis=1)
    return float(medians.max() / medians.min() - 1)


def poisson_arrivals(rate: float, count: int, *, seed: int = 0) -> list[float]:
    """Seconds at which ``count`` requests are due, ``rate`` a second on average, each independent of the others."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, count)
    return [float(at) for at in np.cumsum(gaps)]
