"""Percentiles, confidence intervals, stability and arrival times, compared with known values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from imprompt_bench.results import Sample
from imprompt_bench.scenarios import recovery
from imprompt_bench.stats import PERCENTILES, percentile, poisson_arrivals, ratio, spread


def test_percentiles() -> None:
    samples = [float(value) for value in range(101)]
    assert [percentile(samples, q).value for q in PERCENTILES] == [50, 90, 99]


def test_interval_has_the_theoretical_width() -> None:
    """The median of n normal samples has a standard deviation of sqrt(pi / 2n)."""
    samples = np.random.default_rng(1).normal(10, 1, 400)
    estimate = percentile(list(samples), 50)
    deviation = (estimate.high - estimate.low) / (2 * 1.96)
    assert estimate.low < estimate.value < estimate.high
    assert deviation == pytest.approx(math.sqrt(math.pi / 800), rel=0.35)


def test_intervals_contain_the_true_value_as_often_as_claimed() -> None:
    generator = np.random.default_rng(2)
    contained = 0
    for _ in range(100):
        estimate = percentile(list(generator.exponential(1.0, 60)), 50)
        contained += estimate.low <= math.log(2) <= estimate.high
    assert 88 <= contained <= 100


def test_more_samples_narrow_the_interval() -> None:
    generator = np.random.default_rng(3)
    few, many = (percentile(list(generator.normal(1, 0.1, size)), 50) for size in (10, 1000))
    assert many.high - many.low < (few.high - few.low) / 3


def test_interval_of_a_single_sample() -> None:
    assert percentile([2.0], 99) == (2.0, 2.0, 2.0)


def test_ratio_of_medians() -> None:
    estimate = ratio([2.0, 2.0, 2.2], [4.0, 4.0, 4.4])
    assert estimate.value == 0.5
    assert estimate.low == pytest.approx(2.0 / 4.4)
    assert estimate.high == pytest.approx(2.2 / 4.0)


@pytest.mark.parametrize(
    ("series", "expected"),
    [
        ([1.0, 1.0, 1.0], 0.0),
        ([1.0, 1.1, 1.21], 0.21),
        ([9.0, 1.0, 1.0, 1.2, 1.2, 1.0, 1.0], 0.2),  # the first sample does not fit into equal windows
        ([1.0, 1.0], None),
    ],
)
def test_spread_of_windows(series: list[float], expected: float | None) -> None:
    assert spread(series) == (expected if expected is None else pytest.approx(expected))


def test_arrivals_are_poisson() -> None:
    arrivals = poisson_arrivals(5.0, 4000)
    gaps = np.diff([0.0, *arrivals])
    assert arrivals == sorted(arrivals)
    assert gaps.mean() == pytest.approx(1 / 5, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # exponential: deviation equals mean
    assert poisson_arrivals(5.0, 10) == poisson_arrivals(5.0, 10)
    assert poisson_arrivals(5.0, 10) != poisson_arrivals(5.0, 10, seed=1)


def sample(intended: float, latency: float, status: str = "ok") -> Sample:
    return Sample(index=0, intended=intended, sent=intended + 0.5, ended=intended + latency, status=status)


def test_latency_counts_from_the_intended_time() -> None:
    assert sample(1.0, 2.0).latency == 2.0


def test_recovery_is_the_first_result_that_is_fast_again() -> None:
    samples = [sample(10, 5), sample(11, 0.1, "refused"), sample(13, 1.0), sample(14, 4)]
    assert recovery(samples, since=9, latency=1.5) == 4
    assert recovery(samples, since=9, latency=0.5) is None
