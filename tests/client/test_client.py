"""Calls over a real connection: answers, errors, retries, streams and cancellation, of both clients."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from fake_triton import Call, FakeTriton, Refusal, in_turn, picture, picture_answer, refuse, texts, until_cancelled

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
    assert triton.calls[0].metadata["triton_grpc_error"] == "true"


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
        (Status.NOT_FOUND, "gone", InvalidRequest, {"parameter": None}),
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


@pytest.mark.parametrize("url", ["http://localhost:8000", "https://localhost"])
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_web_address_is_refused(kind: Any, url: str) -> None:
    with pytest.raises(InvalidRequest, match="host:port"):
        kind(url)


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
    monkeypatch.setattr(_retry, "GRACE_S", 0.1)
    triton.answer = until_cancelled
    client = make(timeout=0.3)
    with pytest.raises(DeadlineExceeded, match=r"timeout: 0\.3 seconds are over"):
        list(getattr(client, method)(model="one", prompt="a"))
    (call,) = triton.calls
    assert 0 < call.inputs["timeout"].item() <= 0.3
    assert call.seconds_left is not None
    assert call.seconds_left > 0.3
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
