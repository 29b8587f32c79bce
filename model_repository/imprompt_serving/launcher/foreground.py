"""Serve in the foreground: start, watch, restart after a failure, and drain on a signal."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import FrameType

from imprompt_serving.launcher.addresses import Addresses, check_exposure
from imprompt_serving.launcher.backoff import Backoff
from imprompt_serving.launcher.health import Health, health_server
from imprompt_serving.launcher.install import LaunchError, find_triton
from imprompt_serving.launcher.server import POLL_S, Server
from imprompt_serving.launcher.watchdog import Watchdog

MAX_CANARY_AGE_S = 30.0


def serve(
    repository: str | os.PathLike[str],
    *,
    grpc_port: int = 8001,
    http_port: int | None = None,
    metrics_port: int = 8002,
    health_port: int | None = None,
    host: str = "127.0.0.1",
    allow_remote: bool = False,
    on_ready: Callable[[Addresses], None],
    on_loading: Callable[[str], None] = lambda message: None,
    restart: bool = True,
    max_canary_age: float = MAX_CANARY_AGE_S,
    drain_timeout: float = 30.0,
    triton_spans_to: str | None = None,
    verbose: bool = False,
) -> int:
    """Serve until SIGINT or SIGTERM, then drain; a second signal stops everything at once. Main thread only.

    Args:
        on_ready: called once, when the server makes pictures.
        on_loading: called with a message whenever a model has been loaded.
        allow_remote: listen on an address that other machines reach even if callers can crash this Triton.
        restart: whether to restart Triton, on the same ports, after it fails; see `watchdog`.
        triton_spans_to: collector that gets Triton's own spans, as for `Server`.
        max_canary_age: seconds after which a bundle that made no picture is no longer ready (`health_port`).

    Returns:
        The exit status: 0 if all requests finished, 1 if some were aborted, and 128 + the signal number for a signal
        before the server was ready, or for a second signal.

    Raises:
        LaunchError: Triton did not start; or it failed, and `restart` is false. A supervisor should restart the whole
            server.
    """
    server = Server(
        repository,
        grpc_port=grpc_port,
        http_port=http_port,
        metrics_port=metrics_port,
        host=host,
        triton_spans_to=triton_spans_to,
        verbose=verbose,
    )
    if not allow_remote:
        check_exposure(host, find_triton())
    health = Health(max_canary_age=max_canary_age)
    with _received_signals() as signals, ExitStack() as exits:
        exits.callback(server.stop, hurry=lambda: len(signals) > 1)
        address = None if health_port is None else exits.enter_context(health_server(health, host, health_port))
        run = _Run(server, health, signals, on_loading)
        while True:
            try:
                if not run.start():
                    return 128 + signals[0]
                if not health.restarts:
                    on_ready(replace(server.addresses, health=address))
                run.watch()
                drained = run.drain(drain_timeout)
                return 128 + signals[1] if len(signals) > 1 else int(not drained)
            except LaunchError as error:
                server.abort()
                if not restart or signals or not run.was_ready:
                    raise
                run.pause(str(error))
                if signals:
                    return 128 + signals[0]


class _Run:
    """The states of a server that may be started several times."""

    def __init__(self, server: Server, health: Health, signals: list[int], on_loading: Callable[[str], None]) -> None:
        self._server, self._health, self._signals, self._on_loading = server, health, signals, on_loading
        self._watchdog: Watchdog | None = None
        self._backoff = Backoff()
        self._ready_at = self._failed_at = 0.0
        self.was_ready = False

    def start(self) -> bool:
        """Start the server, and wait until every bundle has made a picture; False after a signal."""
        if not self._server.start(give_up=lambda: bool(self._signals), on_loading=self._on_loading):
            return False
        self._watchdog = Watchdog(self._server, max_canary_age=self._health.max_canary_age)
        self._health.canaries = self._watchdog.canaries
        while not self._watchdog.has_seen_pictures():
            if self._signals:
                return False
            self._watchdog.check()
            time.sleep(POLL_S)
        self._ready_at, self.was_ready = time.monotonic(), True
        self._health.state, self._health.failed_starts = "serving", 0
        if self._health.restarts:
            _say(f"serving again after {self._ready_at - self._failed_at:.1f} s")
        return True

    def watch(self) -> None:
        """Watch the server until a signal.

        Raises:
            LaunchError: it failed.
        """
        assert self._watchdog is not None
        while not self._signals:
            self._watchdog.check()
            time.sleep(POLL_S)

    def drain(self, timeout: float) -> bool:
        self._health.state = "draining"
        self._close_watchdog()
        return self._server.drain(timeout, hurry=lambda: len(self._signals) > 1)

    def pause(self, reason: str) -> None:
        """Wait before the next start, or until a signal."""
        self._close_watchdog()
        now, health, run = time.monotonic(), self._health, 0.0
        if health.state == "restarting":
            health.failed_starts += 1
        else:
            self._failed_at, run = now, now - self._ready_at
        pause = self._backoff.next_pause(run)
        health.state, health.reason, health.restarts = "restarting", reason, health.restarts + 1
        _say(f"{reason}; restarting in {pause:g} s")
        while time.monotonic() < now + pause and not self._signals:
            time.sleep(POLL_S)

    def _close_watchdog(self) -> None:
        self._health.canaries = ()
        if self._watchdog is not None:
            self._watchdog.close()
            self._watchdog = None


def _say(message: str) -> None:
    print(f"imprompt: {message}", file=sys.stderr, flush=True)


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
