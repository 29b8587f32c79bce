"""A bundle with several denoisers, one per GPU; here all of them run on the CPU."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from imprompt import Progress
from imprompt_serving.errors import Overloaded, RequestError
from imprompt_serving.job_request import Admission
from imprompt_serving.pipeline.dispatch import Dispatcher
from imprompt_serving.pipeline.models import Tensors, strings
from imprompt_serving.specs import Bundle
from served import Served
from tiny import images
from tiny.oracle import picture_distance

DENOISERS = ("inpaint_denoiser_0", "inpaint_denoiser_1")
PHOTO, STYLE = (photo.resize((64, 64)) for photo in images.photos(2, seed=80))
REQUEST: dict[str, Any] = {
    "prompt": "a photo of a cat",
    "image": PHOTO,
    "mask_image": Image.fromarray(np.repeat(np.repeat([[0, 255]], 64, 0), 32, 1).astype(np.uint8)),
    "ip_adapter_image": STYLE,
    "num_inference_steps": 4,
}


@pytest.fixture
def two(served: Callable[[str], Served]) -> Served:
    return served("inpaint")


def count(two: Served, metric: str, labels: str = "") -> list[float]:
    """Return the metric of each denoiser."""
    metrics = two.metrics()
    return [metrics[f'{metric}{{model="{name}"{labels}}}'] for name in DENOISERS]


def test_denoisers_share_engine_files(two: Served) -> None:
    files = [two.bundle.repository / name / "1" / "unet.onnx" for name in DENOISERS]
    assert files[0].samefile(files[1])
    assert not (two.bundle.repository / "inpaint_denoiser").exists()
    assert Bundle.load(files[1].parent).denoisers == {DENOISERS[0]: 0, DENOISERS[1]: 1}


def test_requests_are_distributed_over_the_denoisers(two: Served) -> None:
    alone = [np.asarray(two.generate(**REQUEST, seed=seed).images[0]) for seed in range(6)]
    before = count(two, "imprompt_jobs_ended_total", ',outcome="finished"')
    with ThreadPoolExecutor(6) as pool:
        together = pool.map(lambda seed: two.generate(**REQUEST, seed=seed), range(6))
        pictures = [np.asarray(result.images[0]) for result in together]
    for one, other in zip(alone, pictures, strict=True):
        assert picture_distance(one, other)[0] <= 1
    time.sleep(0.3)
    ended = np.subtract(count(two, "imprompt_jobs_ended_total", ',outcome="finished"'), before)
    assert sum(ended) == 6
    assert min(ended) >= 2, ended


def test_cancellation_reaches_the_denoiser_of_the_job(two: Served) -> None:
    def leave(seed: int) -> None:
        arguments = REQUEST | {"num_inference_steps": 100, "seed": seed}
        stream = two.client.stream(model="inpaint", **arguments)
        assert isinstance(next(stream), Progress)
        stream.close()

    before = count(two, "imprompt_jobs_ended_total", ',outcome="cancelled"')
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(leave, range(2)))
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        ended = np.subtract(count(two, "imprompt_jobs_ended_total", ',outcome="cancelled"'), before)
        if sum(ended) == 2:
            break
        time.sleep(0.1)
    assert list(ended) == [1, 1]
    assert sum(count(two, "imprompt_jobs", ',state="running"')) == 0


class Queues:
    """Fake denoisers with queues of limited length, which record the messages they receive."""

    def __init__(self, rows_left: Mapping[str, int]) -> None:
        self.rows_left, self.messages = dict(rows_left), list[tuple[str, str]]()

    async def call(self, model: str, tensors: Mapping[str, np.ndarray]) -> Tensors:
        raise NotImplementedError

    async def stream(self, model: str, tensors: Mapping[str, np.ndarray]) -> AsyncIterator[Tensors]:
        await asyncio.sleep(0)
        (what,) = tensors
        self.messages.append((model, what))
        if what == "admit":
            rows = msgspec.json.decode(tensors["admit"][0], type=Admission).rows
            if rows > self.rows_left[model]:
                yield {"error": strings("UNAVAILABLE", f"{model} is full")}
                return
            self.rows_left[model] -= rows
        yield {}


def dispatcher(two: Served, rows_left: tuple[int, int]) -> tuple[Dispatcher, Queues]:
    queues = Queues(dict(zip(DENOISERS, rows_left, strict=True)))
    return Dispatcher(Bundle.load(Path(two.bundle.repository, DENOISERS[0], "1")), queues), queues


def admission(rows: int) -> Admission:
    return Admission(id="job", rows=rows, steps=1, batch_key="64x64")


def test_dispatcher_prefers_the_denoiser_with_the_fewest_rows(two: Served) -> None:
    async def play() -> list[str]:
        dispatch, _ = dispatcher(two, (100, 100))
        return list(await asyncio.gather(*(dispatch.admit(admission(rows)) for rows in (6, 2, 2, 2, 1))))

    zero, one = DENOISERS
    assert asyncio.run(play()) == [zero, one, one, one, zero]


def test_full_queue_sends_a_job_to_the_next_denoiser(two: Served) -> None:
    async def play() -> None:
        dispatch, queues = dispatcher(two, (1, 2))
        assert await dispatch.admit(admission(2)) == DENOISERS[1]
        assert await dispatch.admit(admission(1)) == DENOISERS[0]
        with pytest.raises(Overloaded, match="full"):
            await dispatch.admit(admission(1))
        assert "cancel" not in {what for _, what in queues.messages}, "a refused job needs no cancellation"

    asyncio.run(play())


def test_aborted_job_is_canceled_on_its_denoiser(two: Served) -> None:
    async def play() -> None:
        dispatch, queues = dispatcher(two, (9, 9))
        first, second = admission(4), admission(1)
        assert await dispatch.admit(first) == DENOISERS[0]
        assert await dispatch.admit(second) == DENOISERS[1]
        with suppress(RequestError):
            async with dispatch.reservation(DENOISERS[0], first):
                raise RequestError("failed")
        assert queues.messages[-1] == (DENOISERS[0], "cancel")
        assert await dispatch.admit(admission(1)) == DENOISERS[0], "its rows still count"

    asyncio.run(play())
