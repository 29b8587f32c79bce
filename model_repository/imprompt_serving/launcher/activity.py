"""What a process is doing, as the kernel sees it: stopped, computing, or idle."""

from __future__ import annotations

import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

WINDOW_S = 2.0
"""How far back activity is measured."""
ACTIVE_SHARE = 0.3
"""A process is active if it computes, or waits for a core, for this share of the time."""


class _Sample(NamedTuple):
    at: float
    busy: float
    """Seconds that all threads have computed, or waited for a core."""
    waits_for_disk: bool


class Activity:
    """Observes one process through repeated calls of `sample`."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self._samples: deque[_Sample] = deque()

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    def is_stopped(self) -> bool:
        """Return whether a signal has stopped the process."""
        try:
            return bool(self._process.status() == psutil.STATUS_STOPPED)
        except psutil.NoSuchProcess:
            return False

    def sample(self) -> None:
        now = time.monotonic()
        self._samples.append(_sample(self.pid, now))
        while len(self._samples) > 2 and self._samples[1].at < now - WINDOW_S:
            self._samples.popleft()

    @property
    def active(self) -> bool:
        """Whether the process computed, waited for a core, or waited for the disk in the last seconds."""
        if len(self._samples) < 2:
            return True  # not known yet
        first, last = self._samples[0], self._samples[-1]
        share = (last.busy - first.busy) / max(last.at - first.at, 1e-3)
        return share >= ACTIVE_SHARE or any(sample.waits_for_disk for sample in self._samples)


def _sample(pid: int, now: float) -> _Sample:
    busy, waits = 0.0, False
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(OSError, ValueError, IndexError):  # the thread has ended, or the kernel keeps no such record
            # Nanoseconds on a core, and nanoseconds on the queue for one.
            computed, queued, *_ = (task / "schedstat").read_text().split()
            busy += (int(computed) + int(queued)) / 1e9
            waits |= (task / "stat").read_text().rpartition(") ")[2][0] == "D"
    return _Sample(now, busy, waits)
