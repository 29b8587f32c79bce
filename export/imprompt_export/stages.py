"""Show the stages of the work on an engine, and time them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

StatusCallback = Callable[[str], None]
"""Shows one line of text about the current work."""


@dataclass(kw_only=True, slots=True)
class Stages:
    """The stages of the work on one engine; `show` shows the current one."""

    show: StatusCallback = lambda _: None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Show `stage`, and add the seconds that it takes."""
        self.show(stage)
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def __str__(self) -> str:
        return ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self.seconds.items())
