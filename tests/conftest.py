"""Fixtures for tiny bundles and real servers, started on first use and stopped at the end of the session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

import bundles
from imprompt import Client
from imprompt_demo import demo
from imprompt_serving.launcher import LaunchError, Server
from served import Served


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--in-process", action="store_true", help="skip the tests that need an exported or served bundle")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--in-process"):
        items[:] = [item for item in items if not {"bundle", "world"} & {*getattr(item, "fixturenames", ())}]


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def bundle(request: pytest.FixtureRequest) -> Iterator[Callable[[str], bundles.ExportedBundle]]:
    """Return exported bundles by name. If the whole suite runs, they are exported in the background from the start."""
    cache = Path(str(request.config.cache.mkdir("bundles")))
    if request.config.args_source != pytest.Config.ArgsSource.TESTPATHS:
        yield lambda name: bundles.make(name, cache)
        return
    pool = ProcessPoolExecutor(2, get_context("spawn"), initializer=bundles.give_way)
    ahead = {name: pool.submit(bundles.make, name, cache) for name in bundles.MAKERS}
    yield lambda name: ahead[name].result()
    pool.shutdown(wait=False, cancel_futures=True)


@pytest.fixture(scope="session")
def served(bundle: Callable[[str], bundles.ExportedBundle]) -> Iterator[Callable[[str], Served]]:
    """Return served bundles by name.

    If a server has died, the next test that uses it fails, and the one after that gets a new server.
    """
    running: dict[str, Served] = {}
    with ExitStack() as stack:

        def start(name: str) -> Served:
            if name not in running:
                made = bundle(name)
                server = stack.enter_context(Server(made.repository, http_port=0))
                stack.callback(server.kill)  # at the end of the session, do not wait for a drain
                client = stack.enter_context(Client(server.grpc_address))
                running[name] = Served(made, server, client)
            try:
                running[name].server.check()
            except LaunchError:
                del running[name]
                raise
            return running[name]

        yield start


@pytest.fixture(scope="session")
def world(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Serve the bundles that the demo exports, `world` and `world_lcm`."""
    server = Server(demo.export_once(Path(str(request.config.cache.mkdir("demo")))))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def sd15(served: Callable[[str], Served]) -> Served:
    return served("sd15")
