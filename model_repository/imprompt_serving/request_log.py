"""A log with one JSON line per request, which operators collect: on standard error, or in a file."""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
from collections.abc import Mapping
from contextlib import suppress
from logging.handlers import QueueHandler, QueueListener, WatchedFileHandler
from typing import Any

LOG_VARIABLE = "IMPROMPT_REQUEST_LOG"
"""Environment variable with the file for the lines, or `-` for standard error. Without it, there are none."""
MAX_QUEUED = 10_000
"""Lines that wait for a slow disk or reader. More are dropped: a log must not hold requests up."""


class RequestLog:
    """Writes lines on a thread. The file may be rotated while it is open."""

    def __init__(self, target: str | None) -> None:
        self._queued = _Queued(queue.Queue(MAX_QUEUED))
        self._listener: QueueListener | None = None
        if target is not None:
            file = logging.StreamHandler(sys.stderr) if target == "-" else WatchedFileHandler(target)
            self._listener = QueueListener(self._queued.queue, file)
            self._listener.start()

    @classmethod
    def from_environment(cls) -> RequestLog:
        """Open the log that `LOG_VARIABLE` names."""
        return cls(os.environ.get(LOG_VARIABLE))

    def write(self, fields: Mapping[str, Any]) -> None:
        """Queue a line, and return at once."""
        if self._listener is not None:
            text = json.dumps(fields, separators=(",", ":"))
            self._queued.handle(logging.makeLogRecord({"msg": text}))

    def close(self) -> None:
        """Write the queued lines."""
        if self._listener is not None:
            self._listener.stop()


class _Queued(QueueHandler):
    def enqueue(self, record: logging.LogRecord) -> None:
        with suppress(queue.Full):
            self.queue.put_nowait(record)
