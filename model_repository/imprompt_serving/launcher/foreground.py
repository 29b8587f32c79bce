"""Serve in the foreground: start, run until a signal, drain."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from imprompt_serving.launcher.addresses import Addresses
from imprompt_serving.launcher.install import LaunchError
from imprompt_serving.launcher.server import POLL_S, Server


def serve(
    repository: str | os.PathLike[str],
    *,
    grpc_port: int = 8001,
    http_port: int | None = None,
    metrics_port: int = 8002,
    host: str = "127.0.0.1",
    on_ready: Callable[[Addresses], None],
    drain_timeout: float = 30.0,
    verbose: bool = False,
) -> int:
    """Serve until SIGINT or SIGTERM, then drain; a second signal stops everything at once. Main thread only.

    Returns:
        The exit status: 0 if all requests finished, 1 if some were aborted, and 128 + the signal number for a signal
        before the server was ready, or for a second signal.

    Raises:
        LaunchError: Triton did not start or stopped unexpectedly, or a model process did. A supervisor should restart
            the whole server.
    """
    server = Server(
        repository, grpc_port=grpc_port, http_port=http_port, metrics_port=metrics_port, host=host, verbose=verbose
    )
    with _received_signals() as signals:
        try:
            if not server.start(give_up=lambda: bool(signals)):
                return 128 + signals[0]
            on_ready(server.addresses)
            while not signals:
                server.check()
                time.sleep(POLL_S)
            drained = server.drain(drain_timeout, hurry=lambda: len(signals) > 1)
        except LaunchError:
            server.kill()
            raise
        finally:
            server.stop(hurry=lambda: len(signals) > 1)
        return 128 + signals[1] if len(signals) > 1 else int(not drained)


@contextmanager
def _received_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list, in place of their previous handlers."""
    received: list[int] = []

    def append(number: int, frame: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, append) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
