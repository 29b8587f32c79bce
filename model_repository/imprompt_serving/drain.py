"""How a server that is about to stop tells its models: a file; and how they answer: a gauge.

Triton's own SIGTERM refuses every call between models from that moment on ("Server not ready"), so that a pipeline in
the middle of its work could only fail. The launcher therefore drains first:

1. It creates the file named by the environment variable `IMPROMPT_DRAIN_FILE`. Its text is the time, in seconds since
   the epoch, at which running requests have to end; an empty file means now.
2. A model that fronts callers refuses new requests (UNAVAILABLE), and lets running ones go on until then.
3. The launcher sends SIGTERM when the gauge `imprompt_requests_in_flight` is 0, or a little after that time.

Without the launcher (a container whose entry point is `tritonserver`): set the variable, and let a pre-stop hook write
the file and wait for the gauge.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from imprompt_serving.errors import Overloaded

DRAIN_FILE_VARIABLE = "IMPROMPT_DRAIN_FILE"
IN_FLIGHT_METRIC = "imprompt_requests_in_flight"


def announce_drain(file: Path, *, deadline: float) -> None:
    """Starts the drain: the launcher's side. Written beside and renamed, so that a reader sees all of it or nothing."""
    draft = file.with_suffix(".new")
    draft.write_text(repr(deadline))
    draft.rename(file)


def drain_deadline() -> float | None:
    """None while requests are taken; during a drain, the time (seconds since the epoch) at which running ones end.

    A file that holds no number, such as the empty one that a hook made with `>`, or none that can be read, means now.
    """
    try:
        deadline = float(Path(os.environ[DRAIN_FILE_VARIABLE]).read_bytes())
    except (KeyError, FileNotFoundError):
        return None
    except (OSError, ValueError):
        return 0.0
    return 0.0 if math.isnan(deadline) else deadline


def check_drain_deadline() -> None:
    """For a running request, between two steps. Raises `Overloaded` (UNAVAILABLE) when a drain leaves it no time."""
    deadline = drain_deadline()
    if deadline is not None and time.time() >= deadline:
        raise Overloaded("the server is stopping, and this request did not end in the time that was left")


@contextmanager
def admitted(count: Callable[[float], None]) -> Iterator[None]:
    """Around a request, its final answer included. Raises `Overloaded` (UNAVAILABLE) during a drain.

    `count` adds to the gauge `IN_FLIGHT_METRIC` (`metric.increment`). The second look closes the gap between the first
    one and the counting: the launcher writes the file, then reads the gauge, and so misses no request.
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
        raise Overloaded("the server is stopping and takes no new requests")
