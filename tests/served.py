"""A bundle behind a running Triton, as tests see it."""

from __future__ import annotations

import urllib.request
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import bundles
from imprompt import Client
from imprompt_serving.launcher import Server


@dataclass(frozen=True)
class Served:
    """A bundle behind a running Triton, with a client and the diffusers oracle."""

    bundle: bundles.ExportedBundle
    server: Server
    client: Client

    @cached_property
    def pipe(self) -> Any:
        return self.bundle.oracle()

    def generate(self, **arguments: Any) -> Any:
        return self.client.generate(model=self.bundle.name, **arguments)

    def metrics(self) -> dict[str, float]:
        """What the server's metrics are now, by name and labels as they are written there."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://{self.server.metrics_address}/metrics") as answer:
            lines = [line for line in answer.read().decode().splitlines() if line and not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}
