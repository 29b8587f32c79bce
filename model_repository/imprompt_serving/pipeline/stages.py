"""Measure the time of each stage of a request."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class Stages:
    """Seconds by stage. Stages may overlap: for example, text and image encoders run at the same time.

    Overlapping calls of one stage count once.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    _running: Counter[str] = field(default_factory=Counter)
    _started: dict[str, float] = field(default_factory=dict)

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
                seconds = time.perf_counter() - self._started[stage]
                self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
