"""A small HTTP port for probes of a supervisor or a proxy: `/livez` and `/readyz` say what the canaries last saw.

Triton's own health checks only say that processes were started. These say whether pictures were made a moment ago.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from imprompt_serving.launcher.canary import Canary
from imprompt_serving.launcher.install import LaunchError

REQUEST_TIMEOUT_S = 5.0
"""How long a client may take to send its request."""
SHUTDOWN_POLL_S = 0.05
"""How long the end of the server may be delayed."""
FAILED_STARTS = 5
"""After this many restarts in a row that failed, `/livez` fails too: a new container may help."""

Answer = tuple[HTTPStatus, dict[str, Any]]


@dataclass(slots=True)
class Health:
    """What the launcher knows. Its main thread writes the fields; requests only read them."""

    max_canary_age: float
    """Seconds after which the last picture says nothing about now."""
    state: Literal["starting", "serving", "restarting", "draining"] = "starting"
    restarts: int = 0
    failed_starts: int = 0
    reason: str = ""
    """Why the server was restarted last."""
    canaries: Sequence[Canary] = ()

    def answer(self, path: str) -> Answer:
        """Answer `GET path`."""
        if path == "/livez":
            return _answer(self.failed_starts < FAILED_STARTS, self._summary())
        bundles = self._bundles()
        if path == "/readyz":
            ready = self.state == "serving" and all(bundle["ready"] for bundle in bundles.values())
            return _answer(ready, self._summary() | {"bundles": bundles})
        name = path.removeprefix("/readyz/")
        if name in bundles:
            return _answer(bundles[name]["ready"], self._summary() | bundles[name])
        return HTTPStatus.NOT_FOUND, {"error": "the paths are /livez, /readyz, and /readyz/BUNDLE"}

    def _summary(self) -> dict[str, Any]:
        return {"state": self.state, "restarts": self.restarts, "last_failure": self.reason or None}

    def _bundles(self) -> dict[str, dict[str, Any]]:
        """Describe each bundle: it is ready if both of its pipelines, unary and streaming, made a picture lately."""
        now, bundles = time.monotonic(), dict[str, dict[str, Any]]()
        for canary in self.canaries:
            age = None if canary.last_good is None else round(now - canary.last_good, 1)
            fresh = canary.refused or (age is not None and age <= self.max_canary_age)
            known = bundles.setdefault(canary.front.bundle, {"ready": self.state == "serving", "canary_age_seconds": 0})
            known["ready"] = known["ready"] and fresh
            ages = (known["canary_age_seconds"], age)
            known["canary_age_seconds"] = None if None in ages else max(ages)
            if canary.error:
                known["error"] = canary.error
        return bundles


def _answer(good: bool, body: dict[str, Any]) -> Answer:
    return HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE, body


@contextmanager
def health_server(health: Health, host: str, port: int) -> Iterator[str]:
    """Answer health checks while the context is open; yields the address (`host:port`). Port 0 means any free port.

    Raises:
        LaunchError: the port is in use.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = REQUEST_TIMEOUT_S

        def do_GET(self) -> None:
            status, body = health.answer(self.path.partition("?")[0])
            content = json.dumps(body).encode() + b"\n"
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise LaunchError(f"cannot listen on {host}:{port} (the health port): {error.strerror}") from error
    with server:
        threading.Thread(target=server.serve_forever, args=(SHUTDOWN_POLL_S,), name="health", daemon=True).start()
        try:
            yield f"{host}:{server.server_port}"
        finally:
            server.shutdown()
