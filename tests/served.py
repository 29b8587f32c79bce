"""A bundle that a running Triton serves, for tests."""

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
    """A bundle that a running Triton serves, with a client and the diffusers pipeline to compare with."""

    bundle: bundles.ExportedBundle
    server: Server
    client: Client

    @cached_property
    def pipe(self) -> Any:
        return self.bundle.oracle()

    def generate(self, **arguments: Any) -> Any:
        return self.client.generate(model=self.bundle.name, **arguments)

    def metrics(self) -> dict[str, float]:
        return read_metrics(self.server.metrics_address)


def read_metrics(address: str) -> dict[str, float]:
    """Read the metrics at `address`; keys are names with labels, as in Prometheus' text format."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{address}/metrics") as answer:
        lines = [line for line in answer.read().decode().splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}
