"""Health of the gateway (`/livez`) and of the server behind it (`/readyz`)."""

from __future__ import annotations

import asyncio
import time

from starlette.requests import Request
from starlette.responses import JSONResponse

from imprompt import AsyncClient
from imprompt_gateway.errors import RETRY_AFTER_S

CACHED_S = 1.0
"""How long an answer holds: probes, however many, cost the server one call per second."""
PROBE_TIMEOUT_S = 2.0


class Readiness:
    """Whether the server and all of its models are ready."""

    def __init__(self, client: AsyncClient) -> None:
        self._client, self._lock = client, asyncio.Lock()
        self._ready, self._expires = False, 0.0

    async def check(self) -> bool:
        """Ask the server, unless it was asked less than `CACHED_S` ago."""
        async with self._lock:
            if time.monotonic() > self._expires:
                try:
                    self._ready = await asyncio.wait_for(self._client.is_ready(), PROBE_TIMEOUT_S)
                except TimeoutError:
                    self._ready = False
                self._expires = time.monotonic() + CACHED_S
            return self._ready


async def livez(request: Request) -> JSONResponse:
    """Answer `GET /livez`: the gateway itself responds."""
    return JSONResponse({"live": True})


async def readyz(request: Request) -> JSONResponse:
    """Answer `GET /readyz`: 503 until the server is ready."""
    if await request.app.state.readiness.check():
        return JSONResponse({"ready": True})
    return JSONResponse({"ready": False}, 503, {"Retry-After": str(RETRY_AFTER_S)})
