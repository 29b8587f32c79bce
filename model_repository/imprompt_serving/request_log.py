"""A log with one JSON line per request, which operators collect: on standard error, or in a file."""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from logging.handlers import WatchedFileHandler
from typing import Any

LOG_VARIABLE = "IMPROMPT_REQUEST_LOG"
"""Environment variable with the file for the lines, or `-` for standard error. Without it, there are none."""
MAX_QUEUED = 10_000
"""Lines that wait for a slow disk or reader. More are dropped: a log must not hold requests up."""
CLOSE_S = 1.0
"""How long the end of a process waits for the last lines to be written."""


def _ignore(record: logging.LogRecord) -> None:
    """Drop a line that cannot be written: the disk is full, or the reader has gone."""


class RequestLog:
    """Writes lines on a thread. The file may be rotated while it is open."""

    def __init__(self, target: str | None) -> None:
        self._lines = queue.Queue[str | None](MAX_QUEUED)
        self._thread: threading.Thread | None = None
        if target is not None:
            file = logging.StreamHandler(sys.stderr) if target == "-" else WatchedFileHandler(target)
            self._thread = threading.Thread(target=self._run, args=(file,), name="request log", daemon=True)
            self._thread.start()

    @classmethod
    def from_environment(cls) -> RequestLog:
        """Open the log that `LOG_VARIABLE` names."""
        return cls(os.environ.get(LOG_VARIABLE))

    def write(self, fields: Mapping[str, Any]) -> None:
        """Queue a line, and return at once."""
        if self._thread is not None:
            with suppress(queue.Full):
                self._lines.put_nowait(json.dumps(fields, separators=(",", ":")))

    def close(self) -> None:
        """Write the queued lines."""
        if self._thread is not None:
            with suppress(queue.Full):
                self._lines.put(None, timeout=CLOSE_S)
            self._thread.join(CLOSE_S)

    def _run(self, file: logging.Handler) -> None:
        file.handleError = _ignore  # type: ignore[method-assign]
        while (line := self._lines.get()) is not None:
            file.emit(logging.makeLogRecord({"msg": line}))
