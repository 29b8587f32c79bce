"""A real Envoy in front of real servers, on loopback."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Self

from faults.server import Foreground, wait_for
from served import read_metrics

CONFIGURE = Path(__file__).parents[2] / "deploy/envoy/configure.py"
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def free_port(host: str = "127.0.0.1") -> int:
    with closing(socket.socket()) as bound:
        bound.bind((host, 0))
        port: int = bound.getsockname()[1]
        return port


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


class Envoy:
    """Envoy in front of members. Leaving the context ends it."""

    def __init__(self, members: list[Member], folder: Path) -> None:
        port, self._admin_port = free_port(), free_port()
        self.address, self._members = f"127.0.0.1:{port}", {member.host: member for member in members}
        options = ("--host", "127.0.0.1", "--port", str(port), "--admin-port", str(self._admin_port))
        command = [sys.executable, str(CONFIGURE), *map(str, members), *options]
        config = folder / "envoy.yaml"
        config.write_text(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        envoy = Path(sys.executable).with_name("envoy")
        self._process = subprocess.Popen([str(envoy), "-c", str(config), "--log-level", "error", "--concurrency", "1"])

    def __enter__(self) -> Self:
        wait_for(self._answers, 30, "Envoy answers")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(30)

    def healthy(self) -> set[str]:
        """Return the hosts that Envoy sends requests to."""
        (cluster,) = json.loads(self._get("/clusters?format=json"))["cluster_statuses"]
        return {
            status["address"]["socket_address"]["address"]
            for status in cluster["host_statuses"]
            if status["health_status"] == {"eds_health_status": "HEALTHY"}
        }

    def wait_until(self, condition: Callable[[set[str]], bool], what: str, seconds: float = 120.0) -> None:
        wait_for(lambda: condition(self.healthy()), seconds, what)

    def _answers(self) -> bool:
        assert self._process.poll() is None
        try:
            return bool(self._get("/ready"))
        except OSError:
            return False

    def _get(self, path: str) -> str:
        with _OPENER.open(f"http://127.0.0.1:{self._admin_port}{path}", timeout=5) as answer:
            text: str = answer.read().decode()
            return text
