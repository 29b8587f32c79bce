"""Draining: the server announces that it is about to stop with a file, and its models respond with a gauge.

As soon as Triton receives SIGTERM, it refuses every call between models ("Server not ready"), so requests that are
still running would fail. The launcher therefore drains first:

1. It creates the file named by the environment variable `IMPROMPT_DRAIN_FILE`. The file holds the deadline for running
   requests, in seconds since the epoch; an empty file means now.
2. The pipeline models refuse new requests (UNAVAILABLE) and let running ones continue until the deadline.
3. The launcher sends SIGTERM when the gauge `imprompt_requests_in_flight` is 0, or shortly after the deadline.

Without the launcher (a container whose entry point is `tritonserver`), set the variable, and have a pre-stop hook write
the file and wait for the gauge.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from imprompt_serving.errors import Overloaded

DRAIN_FILE_VARIABLE = "IMPROMPT_DRAIN_FILE"
IN_FLIGHT_METRIC = "imprompt_requests_in_flight"


def announce_drain(file: Path, *, deadline: float) -> None:
    """Start the drain (called by the launcher). Rename a finished draft, so that readers never see a partial file."""
    draft = file.with_suffix(".new")
    draft.write_text(repr(deadline))
    draft.rename(file)


def drain_deadline() -> float | None:
    """Return the deadline of a drain (seconds since the epoch), or None if no drain has started.

    A file without a number, such as an empty one that a hook created with `>`, or an unreadable file means now.
    """
    try:
        deadline = float(Path(os.environ[DRAIN_FILE_VARIABLE]).read_bytes())
    except (KeyError, FileNotFoundError):
        return None
    except (OSError, ValueError):
        return 0.0
    return 0.0 if math.isnan(deadline) else deadline


def check_drain_deadline() -> None:
    """Check, for a running request, that a drain leaves it time.

    Raises:
        Overloaded: the deadline of a drain has passed.
    """
    deadline = drain_deadline()
    if deadline is not None and time.monotonic() >= _monotonic(deadline):
        raise Overloaded("the server is stopping, and this request did not finish before the deadline")


@lru_cache(maxsize=4)
def _monotonic(deadline: float) -> float:
    """Convert a deadline when it is first seen: if the clock is set later, running requests keep their time."""
    return time.monotonic() + deadline - time.time()


@contextmanager
def admitted(count: Callable[[float], None]) -> Iterator[None]:
    """Count a request as in flight, up to and including its final response.

    `count` adds to the gauge `IN_FLIGHT_METRIC` (`metric.increment`). The check is repeated after counting: the
    launcher writes the file first and reads the gauge afterwards, so it cannot miss a request.

    Raises:
        Overloaded: the server is draining.
    """
    _refuse_during_drain()
    count(1)
    try:
        _refuse_during_drain()
        yield
    finally:
        count(-1)


def _refuse_during_drain() -> None:
    if drain_deadline() is not None:
        raise Overloaded("the server is stopping and accepts no new requests")
