"""Real servers over tiny bundles, started when a test first asks for one and stopped at the end of the session."""

from __future__ import annotations

import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

import bundles
from imprompt import Client
from imprompt_serving.launcher import Server


@dataclass(frozen=True)
class Served:
    """A bundle behind a running Triton, with a client and the diffusers oracle."""

    bundle: bundles.Made
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


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def bundle(request: pytest.FixtureRequest) -> Callable[[str], bundles.Made]:
    """Exported bundles by name."""
    cache = Path(str(request.config.cache.mkdir("bundles")))
    return lambda name: bundles.make(name, cache)


@pytest.fixture(scope="session")
def served(bundle: Callable[[str], bundles.Made]) -> Iterator[Callable[[str], Served]]:
    """Served bundles by name."""
    running: dict[str, Served] = {}
    with ExitStack() as stack:

        def start(name: str) -> Served:
            if name not in running:
                made = bundle(name)
                server = stack.enter_context(Server(made.repository))
                stack.callback(server.kill)  # a session's end need not wait for a drain
                client = stack.enter_context(Client(server.grpc_address))
                running[name] = Served(made, server, client)
            return running[name]

        yield start


@pytest.fixture
def sd15(served: Callable[[str], Served]) -> Served:
    return served("sd15")
