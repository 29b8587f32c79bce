"""What the loop tells about itself, for those who want to measure it."""

from __future__ import annotations

from typing import NamedTuple


class Population(NamedTuple):
    """Jobs that have begun and jobs that wait, with their rows."""

    running_jobs: int
    running_rows: int
    waiting_jobs: int
    waiting_rows: int


class Meter:
    """Called by the loop, at times with its lock held: to be quick. This one does not listen."""

    def population(self, population: Population) -> None:
        """Somebody came, began or left."""

    def ticked(self, rows: int, seconds: float) -> None:
        """A call of the UNet, with the scheduler steps after it."""

    def ended(self, outcome: str) -> None:
        """A job has got its final answer: ``finished``, ``cancelled`` or ``failed``."""

    def refused(self, reason: str) -> None:
        """A job was not let in, for ``rows`` or ``seconds``."""
