"""The systems being compared, and the check that they produce the same picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from imprompt import Client
from imprompt_bench.results import BenchError

MAX_LEVELS, MEAN_LEVELS = 2, 0.1
"""Maximum and mean difference allowed between pictures that count as the same, in levels of 255."""

Arguments = dict[str, Any]


class Answer(NamedTuple):
    """A uint8 picture [height, width, 3], and the seconds per stage if known."""

    picture: np.ndarray
    timings: dict[str, float]


System = Callable[[Arguments], Answer]
"""Generates the picture for the arguments of one request (see `Workload.request`)."""


def served_system(client: Client) -> System:
    def generate(arguments: Arguments) -> Answer:
        result = client.generate(**arguments, output_type="np")
        return Answer(result.images[0], result.timings)

    return generate


def distance(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Return the maximum and mean absolute difference of two uint8 pictures."""
    difference = np.abs(a.astype(np.int16) - b.astype(np.int16))
    return float(difference.max()), float(difference.mean())


def check_same_picture(name: str, answer: Answer, expected: Answer, *, exact: bool) -> list[float]:
    """Return the maximum and mean difference between a baseline's picture and the server's.

    Args:
        exact: whether both compute in float32, so that the pictures must be the same.

    Raises:
        BenchError: they are not the same, so comparing times would be meaningless.
    """
    largest, mean = distance(answer.picture, expected.picture)
    if exact and (largest > MAX_LEVELS or mean > MEAN_LEVELS):
        raise BenchError(
            f"{name} produces a different picture than the server: {largest:g} levels apart at most, {mean:.3f} on "
            f"average (allowed: {MAX_LEVELS} and {MEAN_LEVELS}), so times cannot be compared"
        )
    return [largest, mean]
