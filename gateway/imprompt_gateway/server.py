"""Serve the application with uvicorn (`imprompt gateway`)."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

import uvicorn
from starlette.applications import Starlette

from imprompt import AsyncClient
from imprompt_gateway.app import create_app
from imprompt_gateway.auth import read_keys
from imprompt_gateway.tracing import export_spans

DRAIN_S = 30
"""How long running requests may continue after SIGTERM, as in `imprompt serve`."""
BACKLOG = 2048
"""uvicorn's default."""


class _Server(uvicorn.Server):
    def __init__(self, app: Starlette, on_ready: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=DRAIN_S
            )
        )
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()


def run(
    connection: Mapping[str, Any],
    *,
    host: str,
    port: int,
    health_url: str | None,
    key_file: Path | None,
    on_ready: Callable[[str], None],
    parent: TextIO | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM, then let running requests finish.

    Args:
        connection: arguments of `AsyncClient`, such as the gRPC address of the server (`url`).
        port: 0 means any free port.
        health_url: answers 200 while the server makes pictures, such as `/readyz` of its health port.
        key_file: file with the keys of callers; see `read_keys`.
        on_ready: called with the address once the gateway accepts requests.
        parent: end when this pipe is closed, as when the process at its other end has died.

    Raises:
        InvalidRequest: an argument of the connection is invalid.
        OSError: the gateway cannot listen on that address, or the file cannot be read.
        ValueError: the file has no keys.
    """
    export_spans()
    # Waiting and sending again is up to the caller, who is told for how long (`Retry-After`).
    client = AsyncClient(**connection, max_retries=0)
    app = create_app(client, keys=read_keys(key_file) if key_file else (), health_url=health_url)
    with _listen(host, port) as listener:
        bound = listener.getsockname()
        shown = f"[{bound[0]}]" if listener.family == socket.AF_INET6 else bound[0]
        # uvicorn raises the signal that ended it again, for these handlers: the process should end with status 0.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _exit)
        if parent is not None:
            threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
        _Server(app, lambda: on_ready(f"http://{shown}:{bound[1]}")).run(sockets=[listener])


def _end_with(parent: TextIO) -> None:
    parent.read()
    os.kill(os.getpid(), signal.SIGTERM)


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
