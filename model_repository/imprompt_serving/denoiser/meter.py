"""The interface through which the loop reports metrics."""

from __future__ import annotations

from typing import NamedTuple


class Population(NamedTuple):
    """The number of running and waiting jobs, and of their rows."""

    running_jobs: int
    running_rows: int
    waiting_jobs: int
    waiting_rows: int


class Meter:
    """Receives the loop's metrics. This class ignores them; subclasses override methods.

    Methods are called on the thread that owns the jobs, or on those that send answers, and must return quickly.
    """

    def population(self, population: Population) -> None:
        """Record that a job arrived, started, or left."""

    def ticked(self, rows: int, seconds: float) -> None:
        """Record a tick: a UNet call for `rows` rows, and the scheduler steps after it."""

    def ended(self, outcome: str) -> None:
        """Record that a job received its final answer: `finished`, `cancelled`, or `failed`."""

    def refused(self, reason: str) -> None:
        """Record that a job was refused because of `rows` or `seconds`."""
