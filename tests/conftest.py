"""Fixtures for tiny bundles and real servers, started on first use and stopped at the end of the session."""

from __future__ import annotations

import gc
import os
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import pytest
import torch
from xdist.scheduler import LoadFileScheduling

import bundles
from collector import Collector, collecting
from imprompt import Client
from imprompt_export.garbage import rare_collections
from imprompt_serving.launcher import LaunchError, Server
from served import Served

MAX_SERVERS = 3
"""Servers that a process of the suite keeps running. Each takes up to a gigabyte."""
_SERVER = re.compile(r'served\("(\w+)"\)|\b(sd15): Served|\b(world): Server|\bgateway: str')


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--in-process", action="store_true", help="skip the tests that need an exported or served bundle")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--in-process"):
        items[:] = [item for item in items if not {"bundle", "world"} & {*getattr(item, "fixturenames", ())}]


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop() -> Generator[None, object, object]:
    """Exempt all tests and modules from garbage collections, each of which would take most of a second."""
    gc.collect()
    gc.freeze()
    with rare_collections():
        return (yield)


@cache
def _server_of(file: Path) -> str | None:
    """Return the server that the tests in `file` use most; None if they use none."""
    used = Counter("".join(found) or "world" for found in _SERVER.findall(file.read_text()))
    return max((name for name in ("world", *bundles.MAKERS) if name in used), key=used.__getitem__, default=None)


class _ByServer(LoadFileScheduling):
    """Runs all tests that use the same server in one process, so that it is started once."""

    def _split_scope(self, nodeid: str) -> str:
        file = str(super()._split_scope(nodeid))
        return _server_of(self.config.rootpath / file) or file


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> _ByServer | None:
    return _ByServer(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_runtest_setup() -> None:
    """Compute in one thread, also after a test that loads an AOTInductor engine, which sets the number for all.

    On busy cores, layers as small as those of the tests run up to a hundred times slower with two.
    """
    torch.set_num_threads(1)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Export all bundles in the background if the whole suite runs. Tests that need one earlier wait for it."""
    config = session.config
    if hasattr(config, "workerinput") or config.args_source != pytest.Config.ArgsSource.TESTPATHS:
        return
    pool = ProcessPoolExecutor(2, get_context("spawn"), initializer=bundles.give_way)
    first, *others = bundles.MAKERS
    pool.submit(bundles.make, first, _cache(config))
    pool.submit(bundles.make_demo, _cache(config, "demo"))
    for name in others:
        pool.submit(bundles.make, name, _cache(config))
    config.add_cleanup(lambda: pool.shutdown(wait=False, cancel_futures=True))


def _cache(config: pytest.Config, name: str = "bundles") -> Path:
    return Path(str(config.cache.mkdir(name)))


@pytest.fixture(scope="session")
def bundle(request: pytest.FixtureRequest) -> Callable[[str], bundles.ExportedBundle]:
    """Return exported bundles by name."""
    return lambda name: bundles.make(name, _cache(request.config))


@pytest.fixture(scope="session")
def served(bundle: Callable[[str], bundles.ExportedBundle]) -> Iterator[Callable[[str], Served]]:
    """Return served bundles by name.

    The least recently used server stops when there are too many. If a server has died, the next test that uses it
    fails, and the one after that gets a new server.
    """
    running: dict[str, tuple[Served, ExitStack]] = {}

    def start(name: str) -> Served:
        found = running.pop(name, None)
        if found is None:
            made, stack = bundle(name), ExitStack()
            if len(running) == MAX_SERVERS:
                stop(next(iter(running)))
            server = stack.enter_context(Server(made.repository, http_port=0))
            stack.callback(server.kill)  # do not wait for a drain
            found = Served(made, server, stack.enter_context(Client(server.grpc_address))), stack
        running[name] = found
        try:
            found[0].server.check()
        except LaunchError:
            stop(name)
            raise
        return found[0]

    def stop(name: str) -> None:
        running.pop(name)[1].close()

    yield start
    for name in list(running):
        stop(name)


@pytest.fixture(scope="session")
def log_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file in which `world` logs requests."""
    return tmp_path_factory.mktemp("log") / "requests.jsonl"


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """Receive the spans of `world`."""
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="session")
def world(request: pytest.FixtureRequest, log_file: Path, collector: Collector) -> Iterator[Server]:
    """Serve the bundles that the demo exports, `world` and `world_lcm`."""
    server = Server(bundles.make_demo(_cache(request.config, "demo")))
    observed = {"IMPROMPT_REQUEST_LOG": str(log_file), "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
    with mock.patch.dict(os.environ, observed | {"OTEL_BSP_SCHEDULE_DELAY": "100"}):
        server.start()
    yield server
    server.kill()


@pytest.fixture
def sd15(served: Callable[[str], Served]) -> Served:
    return served("sd15")
