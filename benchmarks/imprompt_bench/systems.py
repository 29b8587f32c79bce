"""What makes a picture of a request, and whether two of them make the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from imprompt import Client
from imprompt_bench.results import BenchError

MAX_LEVELS, MEAN_LEVELS = 2, 0.1
"""Largest and mean difference of equal pictures, in levels of 255 (float32, few steps)."""

Arguments = dict[str, Any]


class Answer(NamedTuple):
    """A picture [height, width, 3], uint8, and the seconds of each stage where they are known."""

    picture: np.ndarray
    timings: dict[str, float]


System = Callable[[Arguments], Answer]
"""Makes the picture of one request; arguments as ``Workload.request`` makes them."""


def served(client: Client) -> System:
    def generate(arguments: Arguments) -> Answer:
        result = client.generate(**arguments, output_type="np")
        return Answer(result.images[0], result.timings)

    return generate


def distance(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Largest and mean difference of two uint8 pictures."""
    difference = np.abs(a.astype(np.int16) - b.astype(np.int16))
    return float(difference.max()), float(difference.mean())


def check_same(name: str, answer: Answer, expected: Answer, *, exact: bool) -> list[float]:
    """How far a baseline's picture is from the server's.

    Args:
        exact: whether both compute in float32; they must show the same picture then.

    Raises:
        BenchError: they do not: what is timed would not be the same work.
    """
    largest, mean = distance(answer.picture, expected.picture)
    if exact and (largest > MAX_LEVELS or mean > MEAN_LEVELS):
        raise BenchError(
            f"{name} makes another picture than the server: {largest:g} levels apart at most, {mean:.3f} on average "
            f"(allowed: {MAX_LEVELS} and {MEAN_LEVELS}); their times are not compared"
        )
    return [largest, mean]
