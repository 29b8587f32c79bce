"""Counts and times of requests, in Prometheus' text format."""

from __future__ import annotations

import bisect
import time
from collections import Counter, defaultdict
from itertools import accumulate

from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

BUCKETS_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0)
_UNKNOWN = "other"
"""Label of paths that have no route: callers must not be able to create labels."""


class Metrics:
    """Counts and times of the requests that have ended, by the path of their route."""

    def __init__(self) -> None:
        self.in_flight = 0
        self._requests: Counter[tuple[str, int]] = Counter()
        self._buckets: dict[str, list[int]] = defaultdict(lambda: [0] * (len(BUCKETS_S) + 1))
        self._seconds: dict[str, float] = defaultdict(float)

    def observe(self, route: str, status: int, seconds: float) -> None:
        """Count a request that has ended."""
        self._requests[route, status] += 1
        self._buckets[route][bisect.bisect_left(BUCKETS_S, seconds)] += 1
        self._seconds[route] += seconds

    def text(self) -> str:
        """Return the metrics in Prometheus' text format."""
        name = "imprompt_gateway_requests_total"
        lines = _head(name, "counter", "Requests by route and status.")
        lines += [
            f'{name}{{route="{route}",status="{status}"}} {count}' for (route, status), count in self._requests.items()
        ]
        name = "imprompt_gateway_request_seconds"
        lines += _head(name, "histogram", "Seconds from the first byte of a request to the last of its answer.")
        for route, counts in self._buckets.items():
            for bound, count in zip((*BUCKETS_S, "+Inf"), accumulate(counts), strict=True):
                lines.append(f'{name}_bucket{{route="{route}",le="{bound}"}} {count}')
            lines.append(f'{name}_sum{{route="{route}"}} {self._seconds[route]}')
            lines.append(f'{name}_count{{route="{route}"}} {sum(counts)}')
        name = "imprompt_gateway_requests_in_flight"
        lines += _head(name, "gauge", "Requests that have not ended, this one included.")
        return "\n".join([*lines, f"{name} {self.in_flight}"]) + "\n"


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


class Measure:
    """ASGI middleware that reports requests to `metrics`."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status, start = 500, time.monotonic()

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        self._metrics.in_flight += 1
        try:
            await self._app(scope, receive, watched)
        finally:
            self._metrics.in_flight -= 1
            route = getattr(scope.get("route"), "path", _UNKNOWN)
            self._metrics.observe(route, status, time.monotonic() - start)


async def metrics(request: Request) -> PlainTextResponse:
    """Answer `GET /metrics`."""
    text = request.app.state.metrics.text()
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")
