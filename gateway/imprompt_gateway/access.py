"""The id of each request, its span, and a line about it in the log."""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from imprompt_gateway.errors import ID_HEADER
from imprompt_gateway.tracing import ServerSpan, server_span

LOG_VARIABLE = "IMPROMPT_REQUEST_LOG"
"""Environment variable with the file for the lines, or `-` for standard error. Without it, there are none."""
MAX_QUEUED = 10_000
"""Lines that wait for a slow disk or reader. More are dropped: a log must not hold requests up."""
CLOSE_S = 1.0
"""How long the end of the process waits for the last lines to be written."""
PROBES = ("/livez", "/readyz", "/metrics")
"""Paths that are asked every few seconds. They get a line only if the answer is an error."""
_ID = re.compile(r"[!-~]{1,128}")
"""The ids that the SDK takes."""


def _ignore(record: logging.LogRecord) -> None:
    """Drop a line that cannot be written: the disk is full, or the reader has gone."""


class AccessLog:
    """Writes JSON lines on a thread. The file may be rotated while it is open."""

    def __init__(self, target: str | None) -> None:
        self._lines = queue.Queue[str | None](MAX_QUEUED)
        self._thread: threading.Thread | None = None
        if target is not None:
            file = logging.StreamHandler(sys.stderr) if target == "-" else WatchedFileHandler(target)
            self._thread = threading.Thread(target=self._run, args=(file,), name="access log", daemon=True)
            self._thread.start()

    @classmethod
    def from_environment(cls) -> AccessLog:
        """Open the log that `LOG_VARIABLE` names."""
        return cls(os.environ.get(LOG_VARIABLE))

    def write(self, fields: Mapping[str, Any]) -> None:
        """Queue a line without the fields that are None, and return at once."""
        if self._thread is not None:
            given = {name: value for name, value in fields.items() if value is not None}
            with suppress(queue.Full):
                self._lines.put_nowait(json.dumps(given, separators=(",", ":")))

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


class Identify:
    """ASGI middleware: gives each request an id, which its answer returns, and logs it when it has ended.

    The id is that of the header `X-Request-Id`, if it can be one. Endpoints find it in `request.state.request_id`.
    """

    def __init__(self, app: ASGIApp, *, log: AccessLog) -> None:
        self._app, self._log = app, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get(ID_HEADER, "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status, began = 500, time.monotonic()

        async def identified(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[ID_HEADER] = request_id
            await send(message)

        with server_span(scope, request_id) as span:
            try:
                await self._app(scope, receive, identified)
            finally:
                span.ended(status)
                if scope["path"] not in PROBES or status >= 400:
                    self._log.write(_line(scope, span, status, time.monotonic() - began))


def _line(scope: Scope, span: ServerSpan, status: int, seconds: float) -> dict[str, Any]:
    """Describe a request that has just ended, by its route: its path may hold anything."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "event": "access",
        "request_id": scope["state"]["request_id"],
        "trace_id": span.trace_id,
        "method": scope["method"],
        "route": getattr(scope.get("route"), "path", None),
        "status": status,
        "error": scope["state"].get("error"),
        "seconds": round(seconds, 4),
    }
