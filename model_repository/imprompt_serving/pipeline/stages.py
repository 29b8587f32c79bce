"""Measure the time of each stage of a request."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple


class Interval(NamedTuple):
    """A time in which a stage ran, in seconds of `time.perf_counter`."""

    stage: str
    began: float
    ended: float


@dataclass(slots=True)
class Stages:
    """When the stages of a request ran. Stages may overlap: for example, text and image encoders run at the same time.

    Overlapping calls of one stage count once.
    """

    intervals: list[Interval] = field(default_factory=list)
    _running: Counter[str] = field(default_factory=Counter)
    _started: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage."""
        totals: dict[str, float] = {}
        for stage, began, ended in self.intervals:
            totals[stage] = totals.get(stage, 0.0) + ended - began
        return totals

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the time inside the context to `stage`."""
        if not self._running[stage]:
            self._started[stage] = time.perf_counter()
        self._running[stage] += 1
        try:
            yield
        finally:
            self._running[stage] -= 1
            if not self._running[stage]:
                self.intervals.append(Interval(stage, self._started[stage], time.perf_counter()))

    def add_finished(self, seconds: Mapping[str, float]) -> None:
        """Add stages that another process ran, one after the other, until now."""
        began = time.perf_counter() - sum(seconds.values())
        for stage, duration in seconds.items():
            self.intervals.append(Interval(stage, began, began + duration))
            began += duration
