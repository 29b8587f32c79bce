"""Requests over a real connection to a fake server, with both clients."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from fake_triton import (
    Call,
    FakeTriton,
    in_turn,
    picture,
    picture_answer,
    refuse,
    texts,
)

from imprompt import (
    AsyncClient,
    Client,
    DeadlineExceeded,
    ImpromptError,
    InvalidRequest,
    Progress,
    Result,
)

Status = grpc.StatusCode


def test_generate_returns_pictures(any_client: Any, triton: FakeTriton) -> None:
    result = any_client.generate(model="one", prompt="a")
    assert [image.size for image in result.images] == [(16, 8)]
    assert (result.model, result.seeds, result.timings) == ("one", [0], {"total": 0.5})
    assert result.request_id == triton.calls[0].id
    assert triton.calls[0].model == "one"


def test_stream_yields_progress_then_the_result(any_client: Any, triton: FakeTriton) -> None:
    *steps, result = any_client.stream(model="one", prompt="a", preview=True)
    assert steps == [Progress(step=1, steps=2), Progress(step=2, steps=2)]
    assert isinstance(result, Result)
    assert result.model == "one"
    assert triton.calls[0].model == "one_stream"
    assert "triton_grpc_error" not in triton.calls[0].metadata  # this option can crash Triton 2.51


def test_generate_rejects_stream_only_parameters(any_client: Any) -> None:
    with pytest.raises(InvalidRequest, match="preview: one has no such parameter"):
        any_client.generate(model="one", prompt="a", preview=True)


def test_model_config_is_fetched_once(any_client: Any, triton: FakeTriton) -> None:
    for _ in range(3):
        any_client.generate(model="one", prompt="a")
    assert triton.config_calls == 1


@pytest.mark.parametrize(("status", "fetched"), [(Status.INVALID_ARGUMENT, 2), (Status.INTERNAL, 1)])
def test_model_config_is_only_fetched_again_after_an_invalid_request(
    any_client: Any, triton: FakeTriton, status: grpc.StatusCode, fetched: int
) -> None:
    triton.answer = in_turn(refuse(status, "unexpected input"), picture_answer)
    with pytest.raises(ImpromptError):
        any_client.generate(model="one", prompt="a")
    any_client.generate(model="one", prompt="a")
    assert triton.config_calls == fetched


def test_describe_and_models(any_client: Any) -> None:
    assert any_client.models() == ["none", "one", "two"]
    assert [adapter["name"] for adapter in any_client.describe("two")["ip_adapters"]] == ["plus", "face"]
    assert any_client.is_ready()


@pytest.mark.parametrize("name", ["three", "one_unet", "one_stream"])
def test_error_for_an_unknown_bundle_lists_the_served_ones(any_client: Any, name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"model: unknown bundle '{name}'; served: none, one, two") as caught:
        any_client.generate(model=name, prompt="a")
    assert caught.value.parameter == "model"


@pytest.mark.parametrize("name", [None, 3, b"one", ["one"], "\ud83d", "a\0b", "x" * 10_000, ""])
def test_invalid_bundle_name(any_client: Any, name: Any) -> None:
    any_client.describe("one")
    for call in (any_client.describe, lambda name: list(any_client.stream(model=name, prompt="a"))):
        with pytest.raises(InvalidRequest, match="model: ") as caught:
            call(name)
        assert caught.value.parameter == "model"
        assert len(str(caught.value)) <= 1000


def test_metadata_is_sent(connect: Callable[..., Any], triton: FakeTriton) -> None:
    connect(metadata={"Authorization": "Bearer x"}).generate(model="one", prompt="a")
    assert triton.calls[0].metadata["authorization"] == "Bearer x"


def test_large_responses(any_client: Any, triton: FakeTriton) -> None:
    triton.answer = lambda call: iter([{**picture(), "images": np.zeros((2, 1024, 1024, 3), np.uint8)}])
    assert any_client.generate(model="one", prompt="a", output_type="np").images[1].shape == (1024, 1024, 3)


# Streams of AsyncClient


def test_async_stream_timeout_counts_from_the_call(url: str, triton: FakeTriton) -> None:
    async def run() -> None:
        async with AsyncClient(url) as client:
            stream = client.stream(model="one", prompt="a", timeout=0.2)
            await asyncio.sleep(0.3)
            with pytest.raises(DeadlineExceeded):
                await anext(stream)
            assert not triton.calls

    asyncio.run(run())


def test_async_stream_validates_at_the_call_if_the_model_is_known(url: str, triton: FakeTriton) -> None:
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


# Concurrency


def test_threads_can_share_a_client(url: str, triton: FakeTriton) -> None:
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


def test_tasks_can_share_a_client(url: str, triton: FakeTriton) -> None:
    together = threading.Barrier(4, timeout=5)

    def answer(call: Call) -> Iterator[dict[str, np.ndarray]]:
        together.wait()
        yield {**picture(), "seeds": call.inputs["seed"], "timings": texts("{}")}

    triton.answer = answer

    async def ask() -> list[Result]:
        async with AsyncClient(url) as client:
            return await asyncio.gather(*(client.generate(model="one", prompt="a", seed=seed) for seed in range(4)))

    assert [result.seeds for result in asyncio.run(ask())] == [[0], [1], [2], [3]]
