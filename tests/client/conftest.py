"""A fake server, and clients connected to it that retry almost immediately."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_triton import Call, FakeTriton, running
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner
from typer.testing import Result as Outcome

from imprompt import AsyncClient, Client, Progress, Result, _retry, cli
from imprompt.cli import console


class BlockingAsyncClient:
    """`AsyncClient` with the blocking methods of `Client`, so that one test covers both."""

    def __init__(self, url: str, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncClient(url, **options)

    def __enter__(self) -> BlockingAsyncClient:
        return self

    def __exit__(self, *error: object) -> None:
        self._runner.run(self._client.close())
        self._runner.close()

    def stream(self, **request: Any) -> Iterator[Progress | Result]:
        events = self._client.stream(**request)
        try:
            while True:
                try:
                    yield self._runner.run(anext(events))
                except StopAsyncIteration:
                    return
        finally:
            self._runner.run(events.aclose())

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def call(*arguments: Any, **options: Any) -> Any:
            return await getattr(self._client, name)(*arguments, **options)

        return lambda *arguments, **options: self._runner.run(call(*arguments, **options))


@pytest.fixture
def triton() -> FakeTriton:
    return FakeTriton()


@pytest.fixture
def url(triton: FakeTriton, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(_retry, "FIRST_DELAY_S", 0.01)
    with running(triton) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


@pytest.fixture(params=[Client, BlockingAsyncClient], ids=["sync", "async"])
def connect(request: pytest.FixtureRequest, url: str) -> Iterator[Callable[..., Any]]:
    """Connect a client of each kind, by default to the fake server."""
    with contextlib.ExitStack() as stack:
        yield lambda address=url, **options: stack.enter_context(request.param(address, **options))


@pytest.fixture
def any_client(connect: Callable[..., Any]) -> Any:
    """A client of each kind, connected to the fake server."""
    return connect()


@pytest.fixture
def sent(client: Client, triton: FakeTriton) -> Any:
    """Send a request and return it as the server received it."""

    def send(model: str = "two", prompt: Any = "a", **parameters: Any) -> Call:
        client.generate(model=model, prompt=prompt, **parameters)
        return triton.calls[-1]

    return send


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a few pictures in it."""
    monkeypatch.chdir(tmp_path)
    Path("folder.png").mkdir()
    for name in ("a.png", "b.png", "mask.png"):
        Image.new("RGB", (4, 4), "red").save(name)
    return tmp_path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Any:
    """Run the `imprompt` command in this process."""
    for name in ("IMPROMPT_REQUEST_LOG", "OTEL_EXPORTER_OTLP_ENDPOINT"):  # `serve` sets them
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def run(*arguments: str, url: str | None = None) -> Outcome:
        # Consoles created at import time would write to the real streams, not to those of the runner.
        monkeypatch.setattr(console, "out", Console(width=100))
        monkeypatch.setattr(console, "err", Console(stderr=True, width=100))
        return CliRunner(env={"IMPROMPT_URL": url} if url else None).invoke(cli.app, arguments)

    return run
