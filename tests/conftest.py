"""Real servers over tiny bundles, started when a test first asks for one and stopped at the end of the session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

import bundles
from imprompt import Client
from imprompt_serving.launcher import Server
from served import Served


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
