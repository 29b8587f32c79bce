"""Calls over a real connection: answers, errors, retries, streams and cancellation, of both clients."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from fake_triton import (
    Aborted,
    Call,
    FakeTriton,
    Refusal,
    TritonsOwn,
    in_turn,
    picture,
    picture_answer,
    refuse,
    texts,
    until_cancelled,
)

from imprompt import (
    AsyncClient,
    Cancelled,
    Client,
    ConnectionFailed,
    DeadlineExceeded,
    ImpromptError,
    InvalidRequest,
    Overloaded,
    Progress,
    Result,
    ServerError,
    _retry,
)
from imprompt._transport import channel_options, check_url

Status = grpc.StatusCode
FULL = refuse(Status.UNAVAILABLE, "the waiting line is full; retry in 0.01 s")


class Blocking:
    """`AsyncClient` with the methods of `Client`, so that one test serves both."""

    def __init__(self, url: str, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncClient(url, **options)

    def __enter__(self) -> Blocking:
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


@pytest.fixture(params=[Client, Blocking], ids=["sync", "async"])
def make(request: pytest.FixtureRequest, url: str) -> Iterator[Callable[..., Any]]:
    with contextlib.ExitStack() as stack:
        yield lambda address=url, **options: stack.enter_context(request.param(address, **options))


@pytest.fixture
def client(make: Callable[..., Any]) -> Any:
    return make()


def test_generate_gives_pictures(client: Any, triton: FakeTriton) -> None:
    result = client.generate(model="one", prompt="a")
    assert [image.size for image in result.images] == [(16, 8)]
    assert (result.model, result.seeds, result.timings) == ("one", [0], {"total": 0.5})
    assert result.request_id == triton.calls[0].id
    assert triton.calls[0].model == "one"


def test_stream_gives_progress_then_the_result(client: Any, triton: FakeTriton) -> None:
    *steps, result = client.stream(model="one", prompt="a", preview=True)
    assert steps == [Progress(step=1, steps=2), Progress(step=2, steps=2)]
    assert isinstance(result, Result)
    assert result.model == "one"
    assert triton.calls[0].model == "one_stream"
    assert "triton_grpc_error" not in triton.calls[0].metadata  # it sets off a crash of Triton 2.51


def test_a_request_with_one_answer_knows_nothing_of_previews(client: Any) -> None:
    with pytest.raises(InvalidRequest, match="preview: one has no such parameter"):
        client.generate(model="one", prompt="a", preview=True)


def test_the_server_is_asked_once_what_a_model_takes(client: Any, triton: FakeTriton) -> None:
    for _ in range(3):
        client.generate(model="one", prompt="a")
    assert triton.config_calls == 1


def test_after_a_refusal_it_is_asked_again(client: Any, triton: FakeTriton) -> None:
    triton.answer = in_turn(refuse(Status.INVALID_ARGUMENT, "unexpected input"), picture_answer)
    with pytest.raises(InvalidRequest):
        client.generate(model="one", prompt="a")
    client.generate(model="one", prompt="a")
    assert triton.config_calls == 2


def test_describe_and_models(client: Any) -> None:
    assert client.models() == ["none", "one", "two"]
    assert [adapter["name"] for adapter in client.describe("two")["ip_adapters"]] == ["plus", "face"]
    assert client.is_ready()


@pytest.mark.parametrize("name", ["three", "one_unet", "one_stream"])
def test_an_unknown_model_is_answered_with_those_that_are_served(client: Any, name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"model: no bundle '{name}'; served: none, one, two") as caught:
        client.generate(model=name, prompt="a")
    assert caught.value.parameter == "model"


def test_metadata_goes_with_every_call(make: Callable[..., Any], triton: FakeTriton) -> None:
    make(metadata={"Authorization": "Bearer x"}).generate(model="one", prompt="a")
    assert triton.calls[0].metadata["authorization"] == "Bearer x"


def test_large_answers_pass(client: Any, triton: FakeTriton) -> None:
    triton.answer = lambda call: iter([{**picture(), "images": np.zeros((2, 1024, 1024, 3), np.uint8)}])
    assert client.generate(model="one", prompt="a", output_type="np").images[1].shape == (1024, 1024, 3)


# Errors


@pytest.mark.parametrize("method", ["generate", "stream"])
@pytest.mark.parametrize(
    ("status", "message", "error", "attributes"),
    [
        (Status.INVALID_ARGUMENT, "height: 64 to 512", InvalidRequest, {"parameter": "height"}),
        (Status.INVALID_ARGUMENT, "Something is wrong: no", InvalidRequest, {"parameter": None}),
        (Status.NOT_FOUND, "gone", Overloaded, {"retry_after": None}),  # it was there when the client asked for it
        (Status.RESOURCE_EXHAUSTED, "full; retry in 40 s", Overloaded, {"retry_after": 40.0}),
        (Status.UNAVAILABLE, "full; retry in 40.5 s", Overloaded, {"retry_after": 40.5}),
        (Status.UNAVAILABLE, "not now", Overloaded, {"retry_after": None}),
        (Status.DEADLINE_EXCEEDED, "late", DeadlineExceeded, {}),
        (Status.CANCELLED, "the server stops", Cancelled, {}),
        (Status.INTERNAL, "broken", ServerError, {}),
        (Status.UNKNOWN, "broken", ServerError, {}),
    ],
)
def test_every_status_has_its_exception(
    make: Callable[..., Any],
    triton: FakeTriton,
    method: str,
    status: grpc.StatusCode,
    message: str,
    error: type[ImpromptError],
    attributes: dict[str, Any],
) -> None:
    triton.answer = refuse(status, message)
    client = make(max_retries=0)
    with pytest.raises(ImpromptError) as caught:
        list(getattr(client, method)(model="one", prompt="a"))
    assert type(caught.value) is error
    assert str(caught.value) == message
    assert caught.value.request_id == triton.calls[0].id
    assert {name: getattr(caught.value, name) for name in attributes} == attributes


@pytest.mark.parametrize(
    ("message", "error", "parameter"),
    [
        ("unexpected inference input 'foo' for model 'one_stream'", InvalidRequest, "foo"),
        ("[request id: 7] unexpected shape for input 'seed' for model 'x'. Expected [1]", InvalidRequest, "seed"),
        ("[request id: 7] inference input 'eta' data-type is 'INT64', but model", InvalidRequest, "eta"),
        ("[request id: 7] input byte size mismatch for input 'eta' for model", InvalidRequest, "eta"),
        ("[request id: 7] expected 2 string elements for inference input 'prompt'", InvalidRequest, "prompt"),
        ("incomplete string data for inference input 'prompt', expecting string of length 6", InvalidRequest, "prompt"),
        ("[request id: 7] input 'prompt' already exists in request", InvalidRequest, "prompt"),
        ("[request id: 7] expected number of inputs between 1 and 9 but got 0", InvalidRequest, None),
        ("unexpected inference output 'zzz' for model 'x'", InvalidRequest, None),
        ("Request for unknown model: 'one_stream' is not found", Overloaded, None),
        ("Request for unknown model: 'one_stream' has no available versions", Overloaded, None),
        ("[request id: 7] Exceeds maximum queue size", Overloaded, None),
        ("server is stopping, scheduler for model has stopped accepting new inference requests", Overloaded, None),
        ("Stub process 'one_stream_0_0' is not healthy.", ServerError, None),
        ("broken", ServerError, None),
    ],
)  # fmt: skip
def test_tritons_own_errors_in_a_stream_are_told_apart_by_their_text(
    make: Callable[..., Any], triton: FakeTriton, message: str, error: type[ImpromptError], parameter: str | None
) -> None:
    def answer(call: Call) -> Iterator[dict[str, np.ndarray]]:
        raise TritonsOwn(message)
        yield {}

    triton.answer = answer
    with pytest.raises(ImpromptError) as caught:
        list(make(max_retries=0).stream(model="one", prompt="a"))
    assert type(caught.value) is error
    assert str(caught.value) == message
    assert caught.value.request_id == triton.calls[0].id
    assert getattr(caught.value, "parameter", None) == parameter


def test_a_stream_that_a_proxy_ends_has_the_same_error(client: Any, triton: FakeTriton) -> None:
    def answer(call: Call) -> Iterator[dict[str, np.ndarray]]:
        raise Aborted(Status.INVALID_ARGUMENT, "height: no")
        yield {}

    triton.answer = answer
    with pytest.raises(InvalidRequest, match="height: no"):
        list(client.stream(model="one", prompt="a"))


def test_the_servers_own_limit_of_time_is_a_deadline(make: Callable[..., Any], triton: FakeTriton) -> None:
    triton.answer = refuse(Status.CANCELLED, "timeout: 600 seconds are over")
    with pytest.raises(DeadlineExceeded):
        make().generate(model="one", prompt="a")


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_a_long_message_of_the_server_arrives_shortened(client: Any, triton: FakeTriton, method: str) -> None:
    triton.answer = refuse(Status.INVALID_ARGUMENT, "height: " + "x" * 30_000)
    with pytest.raises(InvalidRequest, match=r"height: xxx.* \.\.\.") as caught:
        list(getattr(client, method)(model="one", prompt="a"))
    assert len(str(caught.value)) == 1000
    assert len(triton.calls) == 1


def test_limits_of_grpc_itself_are_not_taken_for_a_full_server(client: Any, triton: FakeTriton) -> None:
    triton.answer = refuse(Status.RESOURCE_EXHAUSTED, "SERVER: Received message larger than max (5 vs. 4)")
    with pytest.raises(ServerError):
        client.generate(model="one", prompt="a")
    assert len(triton.calls) == 1


def test_builtin_exceptions_catch_them_too() -> None:
    assert issubclass(InvalidRequest, ValueError)
    assert issubclass(DeadlineExceeded, TimeoutError)
    assert issubclass(ConnectionFailed, ConnectionError)


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_nobody_there(make: Callable[..., Any], method: str) -> None:
    client = make("127.0.0.1:1")
    with pytest.raises(ConnectionFailed, match=r"127\.0\.0\.1:1"):
        list(getattr(client, method)(model="one", prompt="a"))
    assert not client.is_ready()


def test_an_answer_without_pictures_is_the_servers_error(client: Any, triton: FakeTriton) -> None:
    triton.answer = lambda call: iter([{"other": np.zeros(1, np.int32)}])
    with pytest.raises(ServerError, match="without pictures"):
        client.generate(model="one", prompt="a")


def test_a_stream_without_a_result_is_the_servers_error(client: Any, triton: FakeTriton) -> None:
    triton.answer = lambda call: iter([{"step": np.array([1], np.int32), "steps": np.array([2], np.int32)}])
    with pytest.raises(ServerError, match="without a result"):
        list(client.stream(model="one", prompt="a"))


# Models that come and go

GONE = refuse(Status.NOT_FOUND, "Request for unknown model: 'one' is not found")


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_a_model_that_triton_has_unloaded_is_waited_for(client: Any, triton: FakeTriton, method: str) -> None:
    triton.answer = in_turn(GONE, GONE, picture_answer)
    answer = getattr(client, method)(model="one", prompt="a")
    assert isinstance(answer if method == "generate" else list(answer)[-1], Result)
    assert len(triton.calls) == 3


def test_so_is_one_that_is_unloaded_while_the_client_asks_for_it(make: Callable[..., Any], triton: FakeTriton) -> None:
    known, unknown = make(max_retries=2), make(max_retries=2)
    known.describe("one")
    config = triton.configs.pop("one")
    with pytest.raises(Overloaded, match="unknown model"):
        known.describe("one")
    with pytest.raises(InvalidRequest, match="no bundle 'one'"):
        unknown.describe("one")
    triton.ready = False
    with pytest.raises(Overloaded, match="unknown model"):
        unknown.describe("one")
    triton.config_calls = 0
    triton.configs["one"] = config
    assert known.describe("one")["name"] == "one"


# Addresses


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
def test_the_port_is_8001_unless_it_is_named(url: str, address: str) -> None:
    assert check_url(url) == address


@pytest.mark.parametrize(
    "url",
    ["", "http://localhost:8000", "https://localhost", "localhost:x", "localhost:0", "localhost:99999", "localhost/",
     "me@localhost:1", "a b", ":8001", "\ud83d", "unix:\0", "h:\u0661", None, 8001, b"localhost", Path("localhost"),
     "x" * 9000 + "/"],
)  # fmt: skip
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_what_is_no_address_is_refused(kind: Any, url: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"url: host:port of the server's gRPC endpoint, such as localhost:8001"):
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
def test_this_machine_is_not_asked_through_a_proxy(address: str, here: bool) -> None:
    assert dict(channel_options(address))["grpc.enable_http_proxy"] == int(not here)


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy"])
def test_a_proxy_in_the_environment_does_no_harm(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    assert make().generate(model="one", prompt="a").images


def test_an_error_through_a_proxy_names_it(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy", "grpc_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://user:secret@127.0.0.1:9")
    with pytest.raises(ConnectionFailed, match="the call went through the proxy of http_proxy") as caught:
        make("192.0.2.1:8001").models()
    assert "secret" not in str(caught.value)


def test_an_http_port_is_named_as_such(make: Callable[..., Any]) -> None:
    server = HTTPServer(("127.0.0.1", 0), type("Quiet", (BaseHTTPRequestHandler,), {"log_message": lambda *_: None}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(ConnectionFailed) as caught:
            make(f"127.0.0.1:{server.server_port}").models()
    finally:
        server.shutdown()
        server.server_close()
    assert str(caught.value).startswith(
        f"127.0.0.1:{server.server_port}: no server answers by gRPC: Failed parsing HTTP/2"
    )
    assert "is to be host:port of the server's gRPC endpoint, such as localhost:8001" in str(caught.value)


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
def test_wrong_settings_are_refused_by_name(kind: Any, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        kind("localhost", **options)
    assert [caught.value.parameter] == list(options)


@pytest.mark.parametrize("value", ["Bearer secret\n", b"Bearer secret", ["Bearer secret"]])
def test_a_secret_is_in_no_message(value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Client(metadata={"authorization": value})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", [None, 3, b"one", ["one"], "\ud83d", "a\0b", "x" * 10_000, ""])
def test_a_name_that_no_bundle_has(client: Any, name: Any) -> None:
    client.describe("one")
    for call in (client.describe, lambda name: list(client.stream(model=name, prompt="a"))):
        with pytest.raises(InvalidRequest, match="model: ") as caught:
            call(name)
        assert caught.value.parameter == "model"
        assert len(str(caught.value)) <= 1000


# Clients that are closed, or see several event loops


def test_a_closed_client_says_so(url: str) -> None:
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
        with pytest.raises(ConnectionFailed, match="this client is closed; make another"):
            call()
    assert not client.is_ready()


def test_a_closed_async_client_says_so(url: str) -> None:
    async def run() -> None:
        client = AsyncClient(url)
        await client.generate(model="one", prompt="a")
        stream = client.stream(model="one", prompt="a")
        await client.close()
        await client.close()
        for call in (client.generate(model="one", prompt="a"), client.describe("two"), client.models(), anext(stream)):
            with pytest.raises(ConnectionFailed, match="this client is closed; make another"):
                await call
        assert not await client.is_ready()

    asyncio.run(run())


def test_an_async_client_serves_one_event_loop_after_the_other(url: str) -> None:
    client = AsyncClient(url)

    async def ask() -> list[Any]:
        events = [event async for event in client.stream(model="one", prompt="a")]
        return [*events, await client.generate(model="one", prompt="a")]

    assert [len(asyncio.run(ask())) for _ in range(3)] == [4, 4, 4]
    assert len(client._connections) == 1  # those of the loops that have ended are gone
    asyncio.run(client.close())


def test_an_async_client_serves_event_loops_in_several_threads(url: str) -> None:
    client, seeds = AsyncClient(url), []

    def ask() -> None:
        seeds.append(asyncio.run(client.generate(model="one", prompt="a")).seeds)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seeds == [[0]] * 4


# Retries


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_a_full_server_is_asked_again(client: Any, triton: FakeTriton, method: str) -> None:
    triton.answer = in_turn(FULL, FULL, picture_answer)
    result = getattr(client, method)(model="one", prompt="a", seed=3)
    assert isinstance(result if method == "generate" else list(result)[-1], Result)
    assert [call.inputs["seed"].item() for call in triton.calls] == [3, 3, 3]


def test_retries_are_bounded(make: Callable[..., Any], triton: FakeTriton) -> None:
    triton.answer = FULL
    with pytest.raises(Overloaded):
        make(max_retries=2).generate(model="one", prompt="a")
    assert len(triton.calls) == 3


@pytest.mark.parametrize(
    "answer",
    [
        refuse(Status.INVALID_ARGUMENT, "height: no"),
        refuse(Status.INTERNAL, "broken"),
        refuse(Status.CANCELLED, "the server stops"),
        refuse(Status.UNAVAILABLE, "full; retry in 3600 s"),
    ],
)
def test_what_is_not_tried_again(client: Any, triton: FakeTriton, answer: Any) -> None:
    triton.answer = answer
    with pytest.raises(ImpromptError):
        client.generate(model="one", prompt="a")
    assert len(triton.calls) == 1


def test_nothing_is_tried_again_after_the_first_answer(client: Any, triton: FakeTriton) -> None:
    def some_steps_then_full(call: Call) -> Iterator[dict[str, np.ndarray]]:
        yield {"step": np.array([1], np.int32), "steps": np.array([2], np.int32)}
        raise Refusal(Status.UNAVAILABLE, "full; retry in 0.01 s")

    triton.answer = some_steps_then_full
    with pytest.raises(Overloaded):
        list(client.stream(model="one", prompt="a"))
    assert len(triton.calls) == 1


def test_the_time_of_retries_counts(client: Any, triton: FakeTriton) -> None:
    triton.answer = in_turn(FULL, picture_answer)
    client.generate(model="one", prompt="a", timeout=5)
    first, second = (call.inputs["timeout"].item() for call in triton.calls)
    assert 4 < second < first <= 5


def test_no_retry_that_would_come_too_late(client: Any, triton: FakeTriton) -> None:
    triton.answer = refuse(Status.UNAVAILABLE, "full; retry in 2 s")
    start = time.monotonic()
    with pytest.raises(Overloaded):
        client.generate(model="one", prompt="a", timeout=1)
    assert time.monotonic() - start < 0.5


def test_pauses_grow_have_jitter_and_follow_the_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_retry, "FIRST_DELAY_S", 0.5)
    budget = _retry.Budget(4, None)
    pauses = [budget.pause(Overloaded("full", retry_after=hint)) for hint in (None, 0.1, 7.0, None)]
    for pause, low in zip(pauses, (0.5, 1.0, 7.0, 4.0), strict=True):
        assert low <= pause <= low * (1 + _retry.JITTER)
    assert len({_retry.Budget(1, None).pause(Overloaded("full")) for _ in range(10)}) > 1
    assert 200 <= _retry.Budget(1, 600.0).pause(Overloaded("full", retry_after=200.0)) <= 200 * (1 + _retry.JITTER)
    with pytest.raises(Overloaded):
        budget.pause(Overloaded("full"))


# Time limits and leaving early


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_timeout_goes_to_the_server_and_ends_the_call(
    make: Callable[..., Any], triton: FakeTriton, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(_retry, "GRACE_S", 0.75)
    triton.answer = until_cancelled
    client = make(timeout=0.25)
    with pytest.raises(DeadlineExceeded, match=r"timeout: 0\.25 seconds are over"):
        list(getattr(client, method)(model="one", prompt="a"))
    (call,) = triton.calls
    assert 0 < call.inputs["timeout"].item() <= 0.25
    assert call.seconds_left is not None
    assert call.seconds_left > 0.25
    assert call.cancelled.wait(2)


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_a_server_that_stops_at_the_deadline_has_the_same_error(client: Any, triton: FakeTriton, method: str) -> None:
    def stops_itself(call: Call) -> Iterator[dict[str, np.ndarray]]:
        time.sleep(call.inputs["timeout"].item() + 0.01)
        raise Refusal(Status.CANCELLED, "time is up")
        yield {}

    triton.answer = stops_itself
    with pytest.raises(DeadlineExceeded):
        list(getattr(client, method)(model="one", prompt="a", timeout=0.2))


def test_timeout_counts_from_the_first_question(client: Any, triton: FakeTriton) -> None:
    triton.config_delay = 0.5
    with pytest.raises(DeadlineExceeded, match=r"timeout: 0\.2 seconds are over"):
        client.generate(model="one", prompt="a", timeout=0.2)
    assert not triton.calls


def test_a_request_without_timeout_has_no_deadline(client: Any, triton: FakeTriton) -> None:
    client.generate(model="one", prompt="a")
    (call,) = triton.calls
    assert "timeout" not in call.inputs
    assert call.seconds_left is None or call.seconds_left > 1e6


def test_closing_a_stream_stops_the_work(client: Any, triton: FakeTriton) -> None:
    triton.answer = until_cancelled
    events = client.stream(model="one", prompt="a")
    assert isinstance(next(events), Progress)
    assert not triton.calls[0].cancelled.is_set()
    events.close()
    assert triton.calls[0].cancelled.wait(2)


def test_an_error_of_the_caller_stops_the_work(client: Any, triton: FakeTriton) -> None:
    triton.answer = until_cancelled
    events = client.stream(model="one", prompt="a")
    next(events)
    with pytest.raises(KeyError):
        events.throw(KeyError)
    assert triton.calls[0].cancelled.wait(2)


def test_a_stream_that_nobody_reads_sends_nothing(client: Any, triton: FakeTriton) -> None:
    client.stream(model="one", prompt="a").close()
    assert not triton.calls


def test_an_interrupt_stops_the_work(url: str, triton: FakeTriton, monkeypatch: pytest.MonkeyPatch) -> None:
    triton.answer = until_cancelled
    with Client(url) as client:
        method = client._stub.ModelInfer

        class Interrupted:
            def __init__(self, call: Any) -> None:
                self.cancel = call.cancel

            def result(self) -> Any:
                while not triton.calls:
                    time.sleep(0.01)
                raise KeyboardInterrupt

        class Method:
            @staticmethod
            def future(*arguments: Any, **options: Any) -> Interrupted:
                return Interrupted(method.future(*arguments, **options))

        monkeypatch.setattr(client._stub, "ModelInfer", Method)
        with pytest.raises(KeyboardInterrupt):
            client.generate(model="one", prompt="a")
        assert triton.calls[0].cancelled.wait(2)


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_cancelling_a_task_stops_the_work(url: str, triton: FakeTriton, method: str) -> None:
    triton.answer = until_cancelled

    async def request(client: AsyncClient) -> None:
        if method == "generate":
            await client.generate(model="one", prompt="a")
        async for _ in client.stream(model="one", prompt="a"):
            pass

    async def leave_early() -> None:
        async with AsyncClient(url) as client:
            with pytest.raises(TimeoutError) as caught:
                await asyncio.wait_for(request(client), 0.3)
            assert not isinstance(caught.value, ImpromptError)
            assert await asyncio.to_thread(triton.calls[0].cancelled.wait, 2)

    asyncio.run(leave_early())


def test_the_time_of_an_async_stream_counts_from_the_call(url: str, triton: FakeTriton) -> None:
    async def run() -> None:
        async with AsyncClient(url) as client:
            stream = client.stream(model="one", prompt="a", timeout=0.2)
            await asyncio.sleep(0.3)
            with pytest.raises(DeadlineExceeded):
                await anext(stream)
            assert not triton.calls

    asyncio.run(run())


def test_an_async_stream_is_checked_at_the_call(url: str, triton: FakeTriton) -> None:
    request: dict[str, Any] = {"model": "one", "prompt": "a"}

    async def run() -> None:
        async with AsyncClient(url) as client:
            wrong: dict[str, Any]
            for wrong in ({"timeout": 0}, {"model": 5}):
                with pytest.raises(InvalidRequest):
                    client.stream(**{**request, **wrong})
            async for _ in client.stream(**request):
                pass
            for wrong in ({"prompt": 3}, {"hight": 64}, {"height": "64"}, {"output_type": "pt"}):
                with pytest.raises(InvalidRequest):
                    client.stream(**{**request, **wrong})

    asyncio.run(run())
    assert len(triton.calls) == 1


# Many at once


def test_threads_share_a_client(url: str, triton: FakeTriton) -> None:
    together = threading.Barrier(4, timeout=5)

    def answer(call: Call) -> Iterator[dict[str, np.ndarray]]:
        together.wait()
        yield {**picture(), "seeds": call.inputs["seed"]}

    triton.answer = answer
    found: dict[int, list[int]] = {}
    with Client(url) as client:

        def ask(seed: int) -> None:
            found[seed] = client.generate(model="one", prompt="a", seed=seed).seeds

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {seed: [seed] for seed in range(4)}


def test_tasks_share_a_client(url: str, triton: FakeTriton) -> None:
    together = threading.Barrier(4, timeout=5)

    def answer(call: Call) -> Iterator[dict[str, np.ndarray]]:
        together.wait()
        yield {**picture(), "seeds": call.inputs["seed"], "timings": texts("{}")}

    triton.answer = answer

    async def ask() -> list[Result]:
        async with AsyncClient(url) as client:
            return await asyncio.gather(*(client.generate(model="one", prompt="a", seed=seed) for seed in range(4)))

    assert [result.seeds for result in asyncio.run(ask())] == [[0], [1], [2], [3]]
