"""Which exception each failure raises, with both clients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from fake_triton import (
    Aborted,
    Call,
    FakeTriton,
    TritonError,
    in_turn,
    picture_answer,
    refuse,
)

from imprompt import (
    Cancelled,
    ConnectionFailed,
    DeadlineExceeded,
    ImpromptError,
    InvalidRequest,
    Overloaded,
    Result,
    ServerError,
)
from imprompt._transport import StreamError, may_be_unreachable

Status = grpc.StatusCode


@pytest.mark.parametrize(
    ("status", "message", "in_stream", "unreachable"),
    [
        (Status.UNAVAILABLE, "connection refused", False, True),
        (Status.UNAVAILABLE, "connection refused", True, False),  # the stream has reached the server
        (Status.UNAVAILABLE, "full; retry in 3 s", False, False),
        (Status.INTERNAL, "broken", False, False),
        (Status.DEADLINE_EXCEEDED, "late", False, False),
    ],
)
def test_only_lost_connections_are_probed(
    status: grpc.StatusCode, message: str, in_stream: bool, unreachable: bool
) -> None:
    failed = (
        StreamError(status, message) if in_stream else SimpleNamespace(code=lambda: status, details=lambda: message)
    )
    assert may_be_unreachable(failed) == unreachable


@pytest.mark.parametrize("method", ["generate", "stream"])
@pytest.mark.parametrize(
    ("status", "message", "error", "attributes"),
    [
        (Status.INVALID_ARGUMENT, "height: 64 to 512", InvalidRequest, {"parameter": "height"}),
        (Status.INVALID_ARGUMENT, "Something is wrong: no", InvalidRequest, {"parameter": None}),
        (Status.NOT_FOUND, "gone", Overloaded, {"retry_after": None}),  # the model existed when it was described
        (Status.RESOURCE_EXHAUSTED, "full; retry in 40 s", Overloaded, {"retry_after": 40.0}),
        (Status.UNAVAILABLE, "full; retry in 40.5 s", Overloaded, {"retry_after": 40.5}),
        (Status.UNAVAILABLE, "not now", Overloaded, {"retry_after": None}),
        (Status.DEADLINE_EXCEEDED, "late", DeadlineExceeded, {}),
        (Status.CANCELLED, "the server is shutting down", Cancelled, {}),
        (Status.INTERNAL, "broken", ServerError, {}),
        (Status.UNKNOWN, "broken", ServerError, {}),
    ],
)
def test_exception_for_each_grpc_status(
    connect: Callable[..., Any],
    triton: FakeTriton,
    method: str,
    status: grpc.StatusCode,
    message: str,
    error: type[ImpromptError],
    attributes: dict[str, Any],
) -> None:
    triton.answer = refuse(status, message)
    client = connect(max_retries=0)
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
        ("Stub process 'one_stream_0_0' is not healthy.", Overloaded, None),
        ("Stub process is not healthy.", Overloaded, None),
        ("broken", ServerError, None),
    ],
)  # fmt: skip
def test_stream_errors_raised_by_triton_are_classified_by_text(
    connect: Callable[..., Any], triton: FakeTriton, message: str, error: type[ImpromptError], parameter: str | None
) -> None:
    def answer(call: Call) -> Iterator[dict[str, np.ndarray]]:
        raise TritonError(message)
        yield {}

    triton.answer = answer
    with pytest.raises(ImpromptError) as caught:
        list(connect(max_retries=0).stream(model="one", prompt="a"))
    assert type(caught.value) is error
    assert str(caught.value) == message
    assert caught.value.request_id == triton.calls[0].id
    assert getattr(caught.value, "parameter", None) == parameter


def test_stream_aborted_by_a_proxy_raises_the_same_error(any_client: Any, triton: FakeTriton) -> None:
    def answer(call: Call) -> Iterator[dict[str, np.ndarray]]:
        raise Aborted(Status.INVALID_ARGUMENT, "height: no")
        yield {}

    triton.answer = answer
    with pytest.raises(InvalidRequest, match="height: no"):
        list(any_client.stream(model="one", prompt="a"))


def test_the_servers_own_time_limit_raises_deadline_exceeded(connect: Callable[..., Any], triton: FakeTriton) -> None:
    triton.answer = refuse(Status.CANCELLED, "timeout: 600 seconds have passed")
    with pytest.raises(DeadlineExceeded):
        connect().generate(model="one", prompt="a")


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_long_server_messages_are_truncated(any_client: Any, triton: FakeTriton, method: str) -> None:
    triton.answer = refuse(Status.INVALID_ARGUMENT, "height: " + "x" * 30_000)
    with pytest.raises(InvalidRequest, match=r"height: xxx.* \.\.\.") as caught:
        list(getattr(any_client, method)(model="one", prompt="a"))
    assert len(str(caught.value)) == 1000
    assert len(triton.calls) == 1


def test_grpc_size_limits_are_not_retried(any_client: Any, triton: FakeTriton) -> None:
    triton.answer = refuse(Status.RESOURCE_EXHAUSTED, "SERVER: Received message larger than max (5 vs. 4)")
    with pytest.raises(ServerError):
        any_client.generate(model="one", prompt="a")
    assert len(triton.calls) == 1


def test_exceptions_derive_from_builtin_ones() -> None:
    assert issubclass(InvalidRequest, ValueError)
    assert issubclass(DeadlineExceeded, TimeoutError)
    assert issubclass(ConnectionFailed, ConnectionError)


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_unreachable_server(connect: Callable[..., Any], method: str) -> None:
    client = connect("127.0.0.1:1")
    with pytest.raises(ConnectionFailed, match=r"127\.0\.0\.1:1"):
        list(getattr(client, method)(model="one", prompt="a"))
    assert not client.is_ready()


def test_response_without_pictures_is_a_server_error(any_client: Any, triton: FakeTriton) -> None:
    triton.answer = lambda call: iter([{"other": np.zeros(1, np.int32)}])
    with pytest.raises(ServerError, match="the response has no pictures"):
        any_client.generate(model="one", prompt="a")


def test_stream_without_a_result_is_a_server_error(any_client: Any, triton: FakeTriton) -> None:
    triton.answer = lambda call: iter([{"step": np.array([1], np.int32), "steps": np.array([2], np.int32)}])
    with pytest.raises(ServerError, match="without a result"):
        list(any_client.stream(model="one", prompt="a"))


# Models that are unloaded and loaded again


GONE = refuse(Status.NOT_FOUND, "Request for unknown model: 'one' is not found")


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_requests_for_an_unloaded_model_are_retried(any_client: Any, triton: FakeTriton, method: str) -> None:
    triton.answer = in_turn(GONE, GONE, picture_answer)
    answer = getattr(any_client, method)(model="one", prompt="a")
    assert isinstance(answer if method == "generate" else list(answer)[-1], Result)
    assert len(triton.calls) == 3


def test_unloaded_model_counts_as_overload_if_it_should_exist(connect: Callable[..., Any], triton: FakeTriton) -> None:
    used_before, new = connect(max_retries=2), connect(max_retries=2)
    used_before.describe("one")
    config = triton.configs.pop("one")
    with pytest.raises(Overloaded, match="unknown model"):
        used_before.describe("one")
    with pytest.raises(InvalidRequest, match="unknown bundle 'one'"):
        new.describe("one")
    triton.ready = False
    with pytest.raises(Overloaded, match="unknown model"):
        new.describe("one")
    triton.config_calls = 0
    triton.configs["one"] = config
    assert used_before.describe("one")["name"] == "one"
