"""The traffic of a fleet: pictures of two sizes, sets of pictures, and clips."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

GUIDANCE_BRANCHES = 2
BURST_S, QUIET_S = 1.0, 1.0
"""Average length of a burst and of the pause after it, in which nothing arrives."""


class Kind(NamedTuple):
    """A kind of request: a picture, a large one, four pictures, or a clip."""

    name: str
    share: float
    pictures: int = 1
    frames: int = 1
    scale: float = 1.0
    """Height and width, relative to the usual size. Requests of different sizes never share a call."""

    @property
    def rows(self) -> int:
        """Rows in the sense of admission: a frame counts as a row."""
        return GUIDANCE_BRANCHES * self.pictures * self.frames


MIX = (
    Kind("picture", 0.5),
    Kind("large", 0.2, scale=1.5),
    Kind("four", 0.2, pictures=4),
    Kind("clip", 0.1, frames=8),
)


def draw(seed: int, mix: tuple[Kind, ...] = MIX) -> Iterator[Kind]:
    """Draw an endless series of requests."""
    chance = random.Random(seed)
    while True:
        yield chance.choices(mix, [kind.share for kind in mix])[0]


def poisson(rate: float, seed: int) -> Iterator[float]:
    """Draw the times (s) of independent arrivals with an average rate of `rate` per second."""
    chance, at = random.Random(seed), 0.0
    while True:
        at += chance.expovariate(rate)
        yield at


def bursty(rate: float, seed: int) -> Iterator[float]:
    """Draw the times (s) of arrivals that come in bursts of random length, with an average rate of `rate`."""
    chance, at = random.Random(seed), 0.0
    burst_rate = rate * (BURST_S + QUIET_S) / BURST_S
    while True:
        end = at + chance.expovariate(1 / BURST_S)
        while (at := at + chance.expovariate(burst_rate)) < end:
            yield at
        at = end + chance.expovariate(1 / QUIET_S)


ARRIVALS = {"poisson": poisson, "bursty": bursty}
