"""A real Envoy in front of servers, with the configuration of `deploy/envoy` and another way of choosing a server."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self

CONFIGURE = Path(__file__).parents[3] / "deploy/envoy/configure.py"
START_S = 30.0
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def free_port(host: str = "127.0.0.1") -> int:
    with closing(socket.socket()) as bound:
        bound.bind((host, 0))
        port: int = bound.getsockname()[1]
        return port


class Envoy:
    """Envoy in front of `members`, each `HOST:GRPC_PORT:HEALTH_PORT`. Leaving the context ends it.

    Args:
        change: edits the configuration, which is parsed YAML.
    """

    def __init__(
        self, members: Sequence[str], folder: Path, change: Callable[[dict[str, Any]], None] = lambda config: None
    ) -> None:
        import yaml

        port, self._admin_port = free_port(), free_port()
        self.address = f"127.0.0.1:{port}"
        options = ("--host", "127.0.0.1", "--port", str(port), "--admin-port", str(self._admin_port))
        command = [sys.executable, str(CONFIGURE), *members, *options]
        config = yaml.safe_load(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        change(config)
        file = folder / f"envoy-{port}.yaml"
        file.write_text(yaml.safe_dump(config))
        envoy = Path(sys.executable).with_name("envoy")
        # By default, two Envoys on a machine would use the same domain socket.
        own = ("--use-dynamic-base-id", "--concurrency", "1", "--log-level", "error")
        self._process = subprocess.Popen([str(envoy), "-c", str(file), *own])

    def __enter__(self) -> Self:
        until = time.monotonic() + START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > until:
                self.__exit__(None, None, None)
                raise RuntimeError("Envoy did not start; its output says why")
            time.sleep(0.05)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(30)

    def healthy(self) -> set[str]:
        """Return the hosts that Envoy sends requests to."""
        (cluster,) = json.loads(self.get("/clusters?format=json"))["cluster_statuses"]
        return {
            status["address"]["socket_address"]["address"]
            for status in cluster["host_statuses"]
            if status["health_status"] == {"eds_health_status": "HEALTHY"}
        }

    def get(self, path: str) -> str:
        """Read a page of Envoy's administration."""
        with _OPENER.open(f"http://127.0.0.1:{self._admin_port}{path}", timeout=5) as answer:
            text: str = answer.read().decode()
            return text

    def _answers(self) -> bool:
        try:
            return bool(self.get("/ready"))
        except OSError:
            return False
