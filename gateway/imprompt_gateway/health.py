"""Health of the gateway (`/livez`) and of the server behind it (`/readyz`)."""

from __future__ import annotations

import asyncio
import time
import urllib.request

from starlette.requests import Request
from starlette.responses import JSONResponse

from imprompt import AsyncClient
from imprompt_gateway.errors import RETRY_AFTER_S

CACHED_S = 1.0
"""How long an answer holds: probes, however many, cost the server one call per second."""
PROBE_TIMEOUT_S = 2.0
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Proxies are for other machines' pages, not for a server next to the gateway."""


class Readiness:
    """Whether the server makes pictures.

    Args:
        client: asks Triton, which only knows whether models were started.
        health_url: asked instead of Triton; it knows better, such as `/readyz` of the health port of `imprompt serve`.
    """

    def __init__(self, client: AsyncClient, health_url: str | None = None) -> None:
        self._client, self._health_url, self._lock = client, health_url, asyncio.Lock()
        self._ready, self._expires = False, 0.0

    async def check(self) -> bool:
        """Ask the server, unless it was asked less than `CACHED_S` ago."""
        async with self._lock:
            if time.monotonic() > self._expires:
                try:
                    self._ready = await asyncio.wait_for(self._ask(), PROBE_TIMEOUT_S)
                except TimeoutError:
                    self._ready = False
                self._expires = time.monotonic() + CACHED_S
            return self._ready

    async def _ask(self) -> bool:
        if self._health_url is None:
            return await self._client.is_ready()
        return await asyncio.to_thread(_answers, self._health_url)


def _answers(url: str) -> bool:
    try:
        with _OPENER.open(url, timeout=PROBE_TIMEOUT_S):
            return True
    except OSError:  # includes answers other than 200
        return False


async def livez(request: Request) -> JSONResponse:
    """Answer `GET /livez`: the gateway itself responds."""
    return JSONResponse({"live": True})


async def readyz(request: Request) -> JSONResponse:
    """Answer `GET /readyz`: 503 until the server is ready."""
    if await request.app.state.readiness.check():
        return JSONResponse({"ready": True})
    return JSONResponse({"ready": False}, 503, {"Retry-After": str(RETRY_AFTER_S)})
