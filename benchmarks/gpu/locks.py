"""One lock for the whole machine: many processes compile side by side, or one alone is timed."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def compiling(work: Path) -> Iterator[None]:
    """Within, nothing is timed; waits for the timing that is going on."""
    with _locked(work / "device.lock", fcntl.LOCK_SH):
        yield


@contextmanager
def alone(work: Path) -> Iterator[None]:
    """Within, no other process of this run compiles or is timed; waits until that is so."""
    with _locked(work / "device.lock", fcntl.LOCK_EX):
        yield


@contextmanager
def writing(work: Path) -> Iterator[None]:
    """Within, no other process changes the results."""
    with _locked(work / "results.lock", fcntl.LOCK_EX):
        yield


@contextmanager
def _locked(file: Path, how: int) -> Iterator[None]:
    # The kernel lets go of the lock when the process ends, whatever ends it.
    with file.open("a") as handle:
        fcntl.flock(handle, how)
        yield
