"""A gateway beside `imprompt serve`, in a child process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from imprompt.cli import console

_DRAIN_S = 35
"""How long to wait for a gateway that ends: a little longer than it waits for its requests."""


@contextmanager
def beside_server(grpc_address: str, health_address: str, *, host: str, port: int) -> Iterator[str]:
    """Run a gateway in a child process, and yield its address. The child ends with this process, however that ends."""
    command = [sys.executable, "-m", "imprompt", "gateway", "--until-stdin-closes", "--url", grpc_address]
    child = subprocess.Popen(
        [*command, "--health-url", f"http://{health_address}/readyz", "--host", host, "--port", str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,  # Ctrl-C must reach only the launcher, which lets running requests finish
    )
    try:
        assert child.stdout is not None
        ready, _, address = child.stdout.readline().strip().partition(" ")
        if ready != "ready":
            console.fail("the gateway did not start")
        yield address
    finally:
        child.terminate()
        try:
            child.wait(_DRAIN_S)
        except subprocess.TimeoutExpired:
            child.kill()
