"""A gateway beside `imprompt serve`, in a child process that is restarted when it fails."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from imprompt.cli import console

_DRAIN_S = 35
"""How long to wait for a gateway that ends: a little longer than it waits for its requests."""
_CHECK_S, _PATIENCE_S = 1.0, 5.0
"""How often the gateway is asked whether it runs, and how long it may take to answer."""
_START_S = 60.0
"""How long a gateway may take to start."""
NextPause = Callable[[float], float]
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Gateway:
    """A gateway for a server. `address` is where it listens, also after it has been restarted."""

    def __init__(
        self, grpc_address: str, health_address: str, *, host: str, port: int, next_pause: NextPause | None
    ) -> None:
        command = [sys.executable, "-m", "imprompt", "gateway", "--until-stdin-closes", "--url", grpc_address]
        self._command = [*command, "--health-url", f"http://{health_address}/readyz", "--host", host]
        self._next_pause = next_pause
        self._stopping = threading.Event()
        self.failed = False
        """Whether it failed and was not restarted."""
        self._child, address = self._start(port)
        if address is None:
            console.fail("the gateway did not start")
        self.address = address
        self._thread = threading.Thread(target=self._watch, name="gateway", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Let the gateway finish its requests."""
        self._stopping.set()
        self._thread.join()
        self._child.terminate()
        try:
            self._child.wait(_DRAIN_S)
        except subprocess.TimeoutExpired:
            self._child.kill()

    def _start(self, port: int) -> tuple[subprocess.Popen[str], str | None]:
        """Return the process, and its address if it started."""
        child = subprocess.Popen(
            [*self._command, "--port", str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,  # Ctrl-C must reach only the launcher, which lets running requests finish
        )
        assert child.stdout is not None
        if select.select([child.stdout], [], [], _START_S)[0]:
            ready, _, address = child.stdout.readline().strip().partition(" ")
            if ready == "ready":
                return child, address
        child.kill()
        child.wait()
        return child, None

    def _watch(self) -> None:
        """Restart the gateway when it fails; or have this process end, as for a signal."""
        port = int(self.address.rpartition(":")[2])
        ready_at: float | None = time.monotonic()
        while (problem := self._wait_for_problem()) is not None:
            if self._next_pause is None:
                self.failed = True
                _say(f"the gateway {problem}")
                os.kill(os.getpid(), signal.SIGTERM)
                return
            pause = self._next_pause(0.0 if ready_at is None else time.monotonic() - ready_at)
            _say(f"the gateway {problem}; restarting it in {pause:g} s")
            if self._stopping.wait(pause):
                return
            self._child, address = self._start(port)
            ready_at = None if address is None else time.monotonic()
            if address is not None:
                _say("the gateway is serving again")

    def _wait_for_problem(self) -> str | None:
        """Watch the process until it fails; None when it should stop."""
        while not self._stopping.wait(_CHECK_S):
            if self._child.poll() is not None:
                return f"has ended (status {self._child.returncode})"
            try:
                _OPENER.open(f"{self.address}/livez", timeout=_PATIENCE_S).close()
            except OSError as error:
                self._child.kill()
                self._child.wait()
                return f"does not answer ({error})"
        return None


def _say(message: str) -> None:
    print(f"imprompt: {message}", file=sys.stderr, flush=True)


@contextmanager
def beside_server(
    grpc_address: str, health_address: str, *, host: str, port: int, next_pause: NextPause | None
) -> Iterator[Gateway]:
    """Run a gateway in a child process, which ends with this process, however that ends.

    Args:
        next_pause: returns the seconds before a restart, given the seconds for which the gateway has run well; None to
            end this process when the gateway fails.
    """
    gateway = Gateway(grpc_address, health_address, host=host, port=port, next_pause=next_pause)
    try:
        yield gateway
    finally:
        gateway.stop()
