"""Where the time of a request goes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class Stages:
    """Seconds by stage. Stages may overlap: the encoders of text and pictures run at the same time.

    Time in which several calls of one stage run counts once.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    _running: Counter[str] = field(default_factory=Counter)
    _began: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        if not self._running[stage]:
            self._began[stage] = time.perf_counter()
        self._running[stage] += 1
        try:
            yield
        finally:
            self._running[stage] -= 1
            if not self._running[stage]:
                seconds = time.perf_counter() - self._began[stage]
                self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
