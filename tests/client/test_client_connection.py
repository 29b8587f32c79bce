"""Addresses, proxies, settings, and the lifetime of a client."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from imprompt import (
    AsyncClient,
    Client,
    ConnectionFailed,
    InvalidRequest,
)
from imprompt._connection import channel_options, check_url


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("localhost", "localhost:8001"),
        ("localhost:9000", "localhost:9000"),
        (" gpu-1.example.com\n", "gpu-1.example.com:8001"),
        ("grpc://localhost", "localhost:8001"),
        ("::1", "[::1]:8001"),
        ("[::1]", "[::1]:8001"),
        ("[::1]:9000", "[::1]:9000"),
        ("unix:/tmp/triton.sock", "unix:/tmp/triton.sock"),
    ],
)
def test_default_port_is_8001(url: str, address: str) -> None:
    assert check_url(url) == address


@pytest.mark.parametrize(
    "url",
    ["", "http://localhost:8000", "https://localhost", "localhost:x", "localhost:0", "localhost:99999", "localhost/",
     "me@localhost:1", "a b", ":8001", "\ud83d", "unix:\0", "h:\u0661", 8001, b"localhost", Path("localhost"),
     "x" * 9000 + "/"],
)  # fmt: skip
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_invalid_url(kind: Any, url: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"url: must be the host:port of the server's gRPC endpoint, such as"):
        kind(url)


@pytest.mark.parametrize(
    ("address", "here"),
    [
        ("localhost:1", True),
        ("LOCALHOST:1", True),
        ("triton.localhost:1", True),
        ("127.0.0.1:1", True),
        ("127.1.2.3:1", True),
        ("127.1:1", True),
        ("localhost.localdomain:1", True),
        ("localhost.:1", True),
        ("0.0.0.0:1", True),
        ("[::1]:1", True),
        ("[::ffff:127.0.0.1]:1", True),
        ("unix:/tmp/triton.sock", True),
        ("10.0.0.1:1", False),
        ("10.1:1", False),
        ("mylocalhost:1", False),
        ("localhost.example.com:1", False),
    ],
)
def test_loopback_addresses_bypass_proxies(address: str, here: bool) -> None:
    assert dict(channel_options(address))["grpc.enable_http_proxy"] == int(not here)


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy"])
def test_proxy_variables_do_not_affect_loopback_connections(
    connect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    assert connect().generate(model="one", prompt="a").images


def test_error_names_the_proxy_variable(connect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy", "grpc_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://user:secret@127.0.0.1:9")
    with pytest.raises(ConnectionFailed, match="the call went through the proxy set in http_proxy") as caught:
        connect("192.0.2.1:8001").models()
    assert "secret" not in str(caught.value)


def test_error_for_an_http_port_says_what_the_url_must_be(connect: Callable[..., Any]) -> None:
    server = HTTPServer(("127.0.0.1", 0), type("Quiet", (BaseHTTPRequestHandler,), {"log_message": lambda *_: None}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(ConnectionFailed) as caught:
            connect(f"127.0.0.1:{server.server_port}").models()
    finally:
        server.shutdown()
        server.server_close()
    assert str(caught.value).startswith(
        f"127.0.0.1:{server.server_port}: cannot reach a gRPC server: Failed parsing HTTP/2"
    )
    assert "the address must be the host:port of the server's gRPC endpoint" in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"timeout": 0},
        {"timeout": "1"},
        {"max_retries": -1},
        {"max_retries": "3"},
        {"max_retries": 1.5},
        {"credentials": True},
        {"metadata": "authorization"},
        {"metadata": 5},
        {"metadata": {"authorization": 5}},
        {"metadata": {"a b": "c"}},
        {"metadata": {"": "c"}},
        {"metadata": {"a": "\n"}},
        {"metadata": {"a": "ä"}},
        {"metadata": [("a", "b", "c")]},
        {"metadata": {"a-bin": "b"}},
    ],
)
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_error_for_an_invalid_setting_names_it(kind: Any, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        kind("localhost", **options)
    assert [caught.value.parameter] == list(options)


@pytest.mark.parametrize("value", ["Bearer secret\n", b"Bearer secret", ["Bearer secret"]])
def test_errors_never_show_metadata_values(value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Client(metadata={"authorization": value})
    assert "secret" not in str(caught.value)


# Closed clients and event loops


def test_closed_client(url: str) -> None:
    client = Client(url)
    client.generate(model="one", prompt="a")
    stream = client.stream(model="one", prompt="a")
    client.close()
    client.close()
    for call in (
        lambda: client.generate(model="one", prompt="a"),
        lambda: client.describe("two"),
        client.models,
        lambda: next(stream),
    ):
        with pytest.raises(ConnectionFailed, match="this client is closed; create a new one"):
            call()
    assert not client.is_ready()


def test_client_closes_at_the_end_of_a_with_statement(url: str) -> None:
    with Client(url) as client:
        client.generate(model="one", prompt="a")
    with pytest.raises(ConnectionFailed, match="this client is closed"):
        client.models()

    async def run() -> None:
        async with AsyncClient(url) as client:
            await client.generate(model="one", prompt="a")
        with pytest.raises(ConnectionFailed, match="this client is closed"):
            await client.models()

    asyncio.run(run())


def test_closed_async_client(url: str) -> None:
    async def run() -> None:
        client = AsyncClient(url)
        await client.generate(model="one", prompt="a")
        stream = client.stream(model="one", prompt="a")
        await client.close()
        await client.close()
        for call in (client.generate(model="one", prompt="a"), client.describe("two"), client.models(), anext(stream)):
            with pytest.raises(ConnectionFailed, match="this client is closed; create a new one"):
                await call
        assert not await client.is_ready()

    asyncio.run(run())


def test_async_client_works_in_consecutive_event_loops(url: str) -> None:
    client = AsyncClient(url)

    async def ask() -> list[Any]:
        events = [event async for event in client.stream(model="one", prompt="a")]
        return [*events, await client.generate(model="one", prompt="a")]

    assert [len(asyncio.run(ask())) for _ in range(3)] == [4, 4, 4]
    assert len(client._channels) == 1  # connections of closed loops are dropped
    asyncio.run(client.close())


def test_async_client_works_in_event_loops_of_several_threads(url: str) -> None:
    client, seeds = AsyncClient(url), []

    def ask() -> None:
        seeds.append(asyncio.run(client.generate(model="one", prompt="a")).seeds)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seeds == [[0]] * 4
