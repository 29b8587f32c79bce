"""Retries, timeouts and cancellation, with both clients."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from fake_triton import (
    Call,
    FakeTriton,
    Refusal,
    in_turn,
    picture_answer,
    refuse,
    running,
    until_cancelled,
)

from imprompt import (
    AsyncClient,
    Client,
    ConnectionFailed,
    DeadlineExceeded,
    ImpromptError,
    Overloaded,
    Progress,
    Result,
    _retry,
)

Status = grpc.StatusCode


FULL = refuse(Status.UNAVAILABLE, "the queue is full; retry in 0.01 s")


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_requests_to_a_full_server_are_retried(any_client: Any, triton: FakeTriton, method: str) -> None:
    triton.answer = in_turn(FULL, FULL, picture_answer)
    result = getattr(any_client, method)(model="one", prompt="a", seed=3)
    assert isinstance(result if method == "generate" else list(result)[-1], Result)
    assert [call.inputs["seed"].item() for call in triton.calls] == [3, 3, 3]


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_requests_are_resent_to_a_server_that_restarts(
    connect: Callable[..., Any], triton: FakeTriton, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(_retry, "RECONNECT_S", 0.05)
    with ExitStack() as servers:
        address = servers.enter_context(running(triton))
        client = connect(address)
        client.generate(model="one", prompt="a", seed=1)
        list(client.stream(model="one", prompt="a", seed=2))
        servers.close()
        restart = threading.Timer(
            0.3, lambda: servers.enter_context(running(triton, port=int(address.rpartition(":")[2])))
        )
        restart.start()
        result = getattr(client, method)(model="one", prompt="a", seed=3)
        assert isinstance(result if method == "generate" else list(result)[-1], Result)
        restart.join()
    assert [call.inputs["seed"].item() for call in triton.calls] == [1, 2, 3]


def test_server_that_stays_away_is_an_error(
    connect: Callable[..., Any], triton: FakeTriton, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_retry, "RECONNECT_S", 0.05)
    monkeypatch.setattr(_retry, "RESTART_S", 0.2)
    with running(triton) as address:
        client = connect(address)
        client.generate(model="one", prompt="a")
    with pytest.raises(ConnectionFailed, match="cannot reach a gRPC server"):
        client.generate(model="one", prompt="a")


def test_number_of_retries_is_limited(connect: Callable[..., Any], triton: FakeTriton) -> None:
    triton.answer = FULL
    with pytest.raises(Overloaded):
        connect(max_retries=2).generate(model="one", prompt="a")
    assert len(triton.calls) == 3


@pytest.mark.parametrize(
    "answer",
    [
        refuse(Status.INVALID_ARGUMENT, "height: no"),
        refuse(Status.INTERNAL, "broken"),
        refuse(Status.CANCELLED, "the server is shutting down"),
        refuse(Status.UNAVAILABLE, "full; retry in 3600 s"),
    ],
)
def test_errors_that_are_not_retried(any_client: Any, triton: FakeTriton, answer: Any) -> None:
    triton.answer = answer
    with pytest.raises(ImpromptError):
        any_client.generate(model="one", prompt="a")
    assert len(triton.calls) == 1


def test_streams_are_not_retried_after_the_first_message(any_client: Any, triton: FakeTriton) -> None:
    def some_steps_then_full(call: Call) -> Iterator[dict[str, np.ndarray]]:
        yield {"step": np.array([1], np.int32), "steps": np.array([2], np.int32)}
        raise Refusal(Status.UNAVAILABLE, "full; retry in 0.01 s")

    triton.answer = some_steps_then_full
    with pytest.raises(Overloaded):
        list(any_client.stream(model="one", prompt="a"))
    assert len(triton.calls) == 1


def test_timeout_shrinks_with_each_retry(any_client: Any, triton: FakeTriton) -> None:
    triton.answer = in_turn(FULL, picture_answer)
    any_client.generate(model="one", prompt="a", timeout=5)
    first, second = (call.inputs["timeout"].item() for call in triton.calls)
    assert 4 < second < first <= 5


def test_no_retry_beyond_the_timeout(any_client: Any, triton: FakeTriton) -> None:
    triton.answer = refuse(Status.UNAVAILABLE, "full; retry in 2 s")
    start = time.monotonic()
    with pytest.raises(Overloaded):
        any_client.generate(model="one", prompt="a", timeout=1)
    assert time.monotonic() - start < 0.5


def test_backoff_grows_has_jitter_and_follows_the_servers_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_retry, "FIRST_DELAY_S", 0.5)
    budget = _retry.Budget(4, None)
    delays = [budget.backoff(Overloaded("full", retry_after=hint)) for hint in (None, 0.1, 7.0, None)]
    for delay, low in zip(delays, (0.5, 1.0, 7.0, 4.0), strict=True):
        assert low <= delay <= low * (1 + _retry.JITTER)
    assert len({_retry.Budget(1, None).backoff(Overloaded("full")) for _ in range(10)}) > 1
    assert 200 <= _retry.Budget(1, 600.0).backoff(Overloaded("full", retry_after=200.0)) <= 200 * (1 + _retry.JITTER)
    with pytest.raises(Overloaded):
        budget.backoff(Overloaded("full"))


# Timeouts and cancellation


def test_looking_for_a_lost_server_costs_one_retry_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses have jitter; without a timeout the client looks for two minutes."""
    now, pauses, lost = 100.0, list[float](), ConnectionFailed("the server is gone")
    monkeypatch.setattr(_retry, "time", SimpleNamespace(monotonic=lambda: now))

    def look(budget: _retry.Budget) -> None:
        nonlocal now
        pauses.clear()
        for pause in budget.reconnects(lost):
            pauses.append(pause)
            now += pause

    budget, limited = _retry.Budget(2, None), _retry.Budget(1, 10)
    for _ in range(2):
        with pytest.raises(ConnectionFailed):
            look(budget)
        assert all(0.5 <= pause <= 0.625 for pause in pauses)
        assert len(set(pauses)) > 1
        assert 120 <= sum(pauses) < 121
    with pytest.raises(ConnectionFailed):
        look(budget)
    assert not pauses
    now = 100.0
    with pytest.raises(ConnectionFailed):
        look(limited)
    assert 10 <= sum(pauses) < 11
    assert limited.expired
    assert limited.grpc_timeout is not None
    assert 1 < limited.grpc_timeout <= _retry.GRACE_S  # the server has that long to respond


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_timeout_is_sent_to_the_server_and_ends_the_call(
    connect: Callable[..., Any], triton: FakeTriton, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(_retry, "GRACE_S", 0.75)
    triton.answer = until_cancelled
    client = connect(timeout=0.25)
    with pytest.raises(DeadlineExceeded, match=r"timeout: no result within 0\.25 s"):
        list(getattr(client, method)(model="one", prompt="a"))
    (call,) = triton.calls
    assert 0 < call.inputs["timeout"].item() <= 0.25
    assert call.seconds_left is not None
    assert call.seconds_left > 0.25
    assert call.cancelled.wait(2)


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_server_that_stops_at_the_deadline_raises_the_same_error(
    any_client: Any, triton: FakeTriton, method: str
) -> None:
    def stops_itself(call: Call) -> Iterator[dict[str, np.ndarray]]:
        time.sleep(call.inputs["timeout"].item() + 0.01)
        raise Refusal(Status.CANCELLED, "time is up")
        yield {}

    triton.answer = stops_itself
    with pytest.raises(DeadlineExceeded):
        list(getattr(any_client, method)(model="one", prompt="a", timeout=0.2))


def test_timeout_includes_fetching_the_model_config(any_client: Any, triton: FakeTriton) -> None:
    triton.config_delay = 0.5
    with pytest.raises(DeadlineExceeded, match=r"timeout: no result within 0\.2 s"):
        any_client.generate(model="one", prompt="a", timeout=0.2)
    assert not triton.calls


def test_request_without_timeout_has_no_deadline(any_client: Any, triton: FakeTriton) -> None:
    any_client.generate(model="one", prompt="a")
    (call,) = triton.calls
    assert "timeout" not in call.inputs
    assert call.seconds_left is None or call.seconds_left > 1e6


def test_closing_a_stream_stops_the_work(any_client: Any, triton: FakeTriton) -> None:
    triton.answer = until_cancelled
    events = any_client.stream(model="one", prompt="a")
    assert isinstance(next(events), Progress)
    assert not triton.calls[0].cancelled.is_set()
    events.close()
    assert triton.calls[0].cancelled.wait(2)


def test_raising_in_a_stream_stops_the_work(any_client: Any, triton: FakeTriton) -> None:
    triton.answer = until_cancelled
    events = any_client.stream(model="one", prompt="a")
    next(events)
    with pytest.raises(KeyError):
        events.throw(KeyError)
    assert triton.calls[0].cancelled.wait(2)


def test_unread_stream_sends_nothing(any_client: Any, triton: FakeTriton) -> None:
    any_client.stream(model="one", prompt="a").close()
    assert not triton.calls


def test_keyboard_interrupt_stops_the_work(url: str, triton: FakeTriton, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_canceling_a_task_stops_the_work(url: str, triton: FakeTriton, method: str) -> None:
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
