"""Limits on the body of a request: its size, counted while it arrives, and the time that it may take."""

from __future__ import annotations

import asyncio
import time

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

BODY_TIMEOUT_S = 120.0
"""Enough for 64 MiB at 5 Mbit/s."""
_CLOSE = {"Connection": "close"}
"""The rest of the body would be read as the next request otherwise."""


class LimitBody:
    """ASGI middleware: reading a body that is too large or too slow raises `HTTPException` in the endpoint."""

    def __init__(self, app: ASGIApp, *, max_bytes: int, timeout: float = BODY_TIMEOUT_S) -> None:
        self._app, self._max_bytes, self._timeout = app, max_bytes, timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            receive = _Body(scope, receive, self._max_bytes, time.monotonic() + self._timeout).receive
        await self._app(scope, receive, send)


class _Body:
    def __init__(self, scope: Scope, receive: Receive, max_bytes: int, deadline: float) -> None:
        self._receive, self._max_bytes, self._deadline = receive, max_bytes, deadline
        declared = Headers(scope=scope).get("content-length", "")
        self._declared = int(declared) if declared.isdecimal() else 0
        self._bytes = 0
        self._complete = False

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()  # waits until the caller disconnects
        self._check(self._declared)
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, "the body of the request took too long to arrive", _CLOSE) from None
        self._bytes += len(message.get("body", b""))
        self._check(self._bytes)
        self._complete = not message.get("more_body", False)
        return message

    def _check(self, size: int) -> None:
        if size > self._max_bytes:
            limit = f"the body of the request has more than {self._max_bytes} bytes"
            raise HTTPException(413, limit, _CLOSE)
