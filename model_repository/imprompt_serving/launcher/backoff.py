"""Pauses before the restarts of a process."""

from __future__ import annotations

FIRST_PAUSE_S, MAX_PAUSE_S = 1.0, 60.0
GOOD_RUN = 10.0
"""A run is good if it lasts this many times as long as the pause before it."""


class Backoff:
    """Pauses that double while the process cannot run for long, and start over after a good run.

    So a process that fails from time to time is back at once, and one that keeps failing spares the machine.
    """

    def __init__(self) -> None:
        self._pause = 0.0

    def next_pause(self, run: float) -> float:
        """Return the seconds to wait before a restart. The process worked for `run` seconds; 0 if it did not start."""
        good = run >= GOOD_RUN * self._pause
        self._pause = FIRST_PAUSE_S if good else min(2 * self._pause, MAX_PAUSE_S)
        return self._pause
