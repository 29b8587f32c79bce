"""Statistics: percentiles with confidence intervals, stability of a series, and random arrival times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

PERCENTILES = (50, 90, 99)
RESAMPLES = 2000
CONFIDENCE = 0.95
WINDOWS = 3
STABLE_WITHIN = 0.10
"""A series is in steady state if the medians of its windows differ by at most this fraction."""


class Estimate(NamedTuple):
    """An estimate and its `CONFIDENCE` interval."""

    value: float
    low: float
    high: float


def percentile(samples: Sequence[float], q: float, *, seed: int = 0) -> Estimate:
    """Estimate percentile `q` (0 to 100) of `samples`, with a bootstrap interval (percentile method, Efron 1979)."""
    values = np.asarray(samples, np.float64)
    draws = np.random.default_rng(seed).choice(values, (RESAMPLES, len(values)))
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(np.percentile(draws, q, axis=1), [tail, 100 - tail])
    return Estimate(float(np.percentile(values, q)), float(low), float(high))


def ratio(samples: Sequence[float], reference: Sequence[float], *, seed: int = 0) -> Estimate:
    """Estimate the median of `samples` over the median of `reference`, with a bootstrap interval."""
    generator = np.random.default_rng(seed)
    medians = [
        np.median(generator.choice(np.asarray(values), (RESAMPLES, len(values))), axis=1)
        for values in (samples, reference)
    ]
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(medians[0] / medians[1], [tail, 100 - tail])
    return Estimate(float(np.median(samples) / np.median(reference)), float(low), float(high))


def spread(series: Sequence[float], windows: int = WINDOWS) -> float | None:
    """Return the ratio of the largest to the smallest median of `windows` equal parts of `series`, minus one.

    Samples that do not fit into equal parts are dropped from the start, the warm-up. None if the series is too short.
    """
    length = len(series) // windows
    if not length:
        return None
    recent = np.asarray(series[len(series) - windows * length :]).reshape(windows, length)
    medians = np.median(recent, axis=1)
    return float(medians.max() / medians.min() - 1)


def poisson_arrivals(rate: float, count: int, *, seed: int = 0) -> list[float]:
    """Draw the times (s) of `count` independent arrivals with an average rate of `rate` per second."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, count)
    return [float(at) for at in np.cumsum(gaps)]
