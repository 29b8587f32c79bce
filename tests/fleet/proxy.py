"""Servers behind a real Envoy, on loopback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from faults.server import Foreground, wait_for
from imprompt_bench.fleet.envoy import Envoy, free_port
from served import read_metrics


class Member:
    """A server at a fixed address, which can be started again after it has ended."""

    def __init__(self, repository: Path, host: str) -> None:
        self.host, self._repository = host, repository
        self.grpc_port, self.health_port = free_port(host), free_port(host)
        self.server: Foreground | None = None

    def start(self) -> Foreground:
        self.server = Foreground(
            self._repository,
            *("--host", self.host, "--grpc-port", str(self.grpc_port), "--health-port", str(self.health_port)),
            *("--restart", "never"),
        )
        return self.server

    def stop(self) -> None:
        if self.server is not None:
            self.server.__exit__(None, None, None)

    def metric(self, name: str) -> float:
        """Sum the samples of a metric whose names start with `name`."""
        assert self.server is not None
        samples = read_metrics(self.server.addresses["metrics"])
        return sum(value for sample, value in samples.items() if sample.startswith(name))

    def __str__(self) -> str:
        return f"{self.host}:{self.grpc_port}:{self.health_port}"


def wait_until(envoy: Envoy, condition: Callable[[set[str]], bool], what: str, seconds: float = 120.0) -> None:
    """Wait until `condition` holds for the hosts that Envoy sends requests to."""
    wait_for(lambda: condition(envoy.healthy()), seconds, what)
