"""Pauses before the restarts of a process."""

from __future__ import annotations

FIRST_PAUSE_S, MAX_PAUSE_S = 1.0, 60.0
GOOD_RUN_S = 10.0
"""A process that worked for this long can run; its next failure is another one."""


class Backoff:
    """Pauses that double while the process cannot run, and start over after a good run.

    So a process that fails from time to time is back at once, and one that fails at once spares the machine.
    """

    def __init__(self) -> None:
        self._pause = 0.0

    def next_pause(self, run: float) -> float:
        """Return the seconds to wait before a restart. The process worked for `run` seconds; 0 if it did not start."""
        first = not self._pause or run >= GOOD_RUN_S
        self._pause = FIRST_PAUSE_S if first else min(2 * self._pause, MAX_PAUSE_S)
        return self._pause
