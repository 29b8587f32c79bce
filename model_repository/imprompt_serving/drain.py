"""How a server that is about to stop tells its models: a file, and a gauge as the answer.

The launcher creates the file named by the environment variable `IMPROMPT_DRAIN_FILE`; its text is the time (seconds since the
epoch) at which running requests are to end. A model that fronts callers counts each request in the gauge
`imprompt_requests_in_flight` *before* it looks at the file, so that the launcher, which writes the file before it reads the
gauge, misses none.
"""

from __future__ import annotations

import os
from pathlib import Path

DRAIN_FILE_VARIABLE = "IMPROMPT_DRAIN_FILE"
IN_FLIGHT_METRIC = "imprompt_requests_in_flight"


def announce_drain(file: Path, *, deadline: float) -> None:
    """Starts the drain. Written beside and renamed, so that a reader sees all of it or nothing."""
    draft = file.with_suffix(".new")
    draft.write_text(repr(deadline))
    draft.rename(file)


def drain_deadline() -> float | None:
    """None while the server takes requests; during a drain, the time (seconds since the epoch) when work has to end."""
    try:
        return float(Path(os.environ[DRAIN_FILE_VARIABLE]).read_text())
    except (KeyError, FileNotFoundError):
        return None
