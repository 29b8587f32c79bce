"""Concurrent requests: each gets the same picture as on its own, and canceled ones leave nothing behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imprompt import Cancelled, Client, DeadlineExceeded, InvalidRequest, Overloaded, Progress, Result
from parity import assert_different
from served import Served
from tiny import images
from tiny.oracle import picture_distance

PHOTOS = images.photos(6, seed=40)
LEFT = Image.fromarray(np.repeat(np.repeat([[255, 0]], 64, 0), 32, 1).astype(np.uint8))
RIGHT = Image.fromarray(np.repeat(np.repeat([[0, 255]], 64, 0), 32, 1).astype(np.uint8))
CAT: dict[str, Any] = {"prompt": "a photo of a cat", "height": 64, "width": 64, "num_inference_steps": 4, "seed": 0}

MIXED: list[dict[str, Any]] = [
    {"ip_adapter_image": {"plain": PHOTOS[0]}, "scheduler": "DDIMScheduler"},
    {"scheduler": "EulerDiscreteScheduler", "num_inference_steps": 6},
    {"ip_adapter_image": {"plus": PHOTOS[1]}, "ip_adapter_scale": 0.3, "scheduler": "PNDMScheduler"},
    {"ip_adapter_image": {"plus": PHOTOS[:3]}, "num_inference_steps": 2},
    {"ip_adapter_image": {"full_face": PHOTOS[2]}, "scheduler": "DPMSolverMultistepScheduler"},
    {"ip_adapter_image": {"plain": PHOTOS[3], "plus": PHOTOS[4]}, "ip_adapter_scale": [0.8, 0.2]},
    {"ip_adapter_image": {"plain": PHOTOS[:2]}, "ip_adapter_masks": {"plain": [LEFT, RIGHT]}},
    {"ip_adapter_image": {"plus": PHOTOS[2:4]}, "ip_adapter_masks": {"plus": [RIGHT, LEFT]}, "guidance_scale": 3.0},
    {"num_images_per_prompt": 3, "seed": [4, 5, 6], "scheduler": "HeunDiscreteScheduler"},
    {"guidance_scale": 1.0, "ip_adapter_image": {"plain": PHOTOS[5]}},
    {"height": 64, "width": 96, "ip_adapter_image": {"plus": PHOTOS[5]}, "num_inference_steps": 3},
    {"height": 32, "width": 96, "scheduler": "UniPCMultistepScheduler"},
    {"image": PHOTOS[1].resize((64, 64)), "height": None, "width": None, "strength": 0.6},
    {
        "image": PHOTOS[1].resize((64, 64)),
        "mask_image": LEFT,
        "ip_adapter_image": {"plain": PHOTOS[0]},
        "scheduler": "EulerAncestralDiscreteScheduler",
    },
    {"prompt": ["a dog", "a house by the sea"], "ip_adapter_image": {"plain": PHOTOS[0]}, "scheduler": "LCMScheduler"},
    {"ip_adapter_image": {"plus": PHOTOS[0]}, "ip_adapter_start": 0.25, "ip_adapter_end": 0.75, "priority": 1},
]


def request(sd15: Served, arguments: dict[str, Any]) -> np.ndarray:
    result = sd15.generate(**{key: value for key, value in (CAT | arguments).items() if value is not None})
    return np.stack([np.asarray(image) for image in result.images])


def test_pictures_do_not_depend_on_concurrent_requests(sd15: Served) -> None:
    alone = [request(sd15, arguments) for arguments in MIXED]
    with ThreadPoolExecutor(len(MIXED)) as pool:
        together = list(pool.map(lambda arguments: request(sd15, arguments), MIXED))
    for arguments, one, other in zip(MIXED, alone, together, strict=True):
        largest, mean = picture_distance(one, other)
        assert largest <= 1, f"{arguments}: {largest} levels (mean {mean:.4f})"
    for one in alone[1:]:
        if one.shape == alone[0].shape:
            assert_different(list(one), list(alone[0]))


@pytest.mark.parametrize("way", ["unary", "stream"])
def test_eight_callers_share_unet_calls(sd15: Served, way: str) -> None:
    """Calls are full while compatible steps wait: a call has room for four guided pictures."""
    steps, callers = 100, 8

    def ask(seed: int) -> None:
        arguments = CAT | {"num_inference_steps": steps, "seed": seed, "scheduler": "DDIMScheduler"}
        if way == "unary":
            sd15.generate(**arguments)
        else:
            assert isinstance(list(sd15.client.stream(model="sd15", **arguments))[-1], Result)

    before = sd15.metrics()
    with ThreadPoolExecutor(callers) as pool:
        list(pool.map(ask, range(callers)))
    time.sleep(0.3)
    after = sd15.metrics()
    calls, rows = (
        after[name] - before[name]
        for name in (f'imprompt_tick_rows_{kind}{{model="sd15_denoiser"}}' for kind in ("count", "sum"))
    )
    assert rows == callers * steps * 2
    assert rows / calls > 6, f"{rows / calls:.1f} rows a call"


def test_bad_requests_do_not_affect_concurrent_good_ones(sd15: Served) -> None:
    """The bad ones fail before, during, and after the creation of the denoiser's job."""
    bad: list[dict[str, Any]] = [
        {"scheduler": "NoScheduler"},
        {"scheduler_config": {"no_such_key": 1}},
        {"height": 100},
        {"ip_adapter_image": {"plus": PHOTOS[0]}, "ip_adapter_scale": {"plus": {"down": {"block_9": 1.0}}}},
        {"scheduler": "DDIMScheduler", "scheduler_config": {"beta_schedule": "none"}},
    ]
    good = MIXED[:4]
    alone = [request(sd15, arguments) for arguments in good]

    def fails(arguments: dict[str, Any]) -> bool:
        with pytest.raises(InvalidRequest):
            request(sd15, arguments)
        return True

    with ThreadPoolExecutor(len(good) + len(bad)) as pool:
        together = [pool.submit(request, sd15, arguments) for arguments in good]
        assert all(pool.map(fails, bad))
        for one, other in zip(alone, together, strict=True):
            assert picture_distance(one, other.result())[0] <= 1


def progress(sd15: Served, **arguments: Any) -> list[Progress]:
    events = list(sd15.client.stream(model="sd15", **CAT | arguments))
    assert isinstance(events[-1], Result)
    return [event for event in events if isinstance(event, Progress)]


def test_progress_with_previews(sd15: Served) -> None:
    events = progress(sd15, num_inference_steps=6, preview=True, progress_every=2)
    assert [event.step for event in events][:2] == [2, 4]
    preview = events[0].preview
    assert preview is not None
    assert preview.size == (64, 64)
    assert np.asarray(preview).std() > 1
    plain = progress(sd15)
    assert [event.step for event in plain[:3]] == [1, 2, 3]
    assert plain[0].preview is None


LONG: dict[str, Any] = CAT | {"num_inference_steps": 999, "scheduler": "DDIMScheduler"}


def test_closing_a_stream_stops_the_work(sd15: Served) -> None:
    for event in sd15.client.stream(model="sd15", **LONG):
        assert isinstance(event, Progress)
        break
    assert_idle(sd15)


@pytest.mark.parametrize("seconds", [0.001, 0.05, 0.5])
def test_timeout_stops_the_work(sd15: Served, seconds: float) -> None:
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        sd15.generate(**LONG, timeout=seconds)
    assert time.monotonic() - began < seconds + 2.0
    assert_idle(sd15)


def test_timeouts_at_any_stage_leave_nothing_behind(sd15: Served) -> None:
    """Requests end while they encode, wait, denoise, or decode; each gets one response."""
    answers: list[Any] = []

    def time_out(delay: float) -> None:
        try:
            arguments = CAT | {"ip_adapter_image": {"plus": PHOTOS[:3]}, "num_images_per_prompt": 2}
            answers.append(sd15.generate(**arguments, timeout=delay))
        except (DeadlineExceeded, Cancelled) as error:
            answers.append(error)

    threads = [threading.Thread(target=time_out, args=(0.02 * 1.25**index,)) for index in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 20
    assert any(isinstance(answer, DeadlineExceeded) for answer in answers)
    assert_idle(sd15)


def test_timeout_is_prompt_with_forty_other_callers(sd15: Served) -> None:
    with ThreadPoolExecutor(40) as pool:
        callers = [pool.submit(request, sd15, {"num_inference_steps": 30, "seed": seed}) for seed in range(40)]
        wait_for(sd15, lambda: total(sd15, "imprompt_jobs{") == 40)
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            sd15.generate(**LONG, timeout=0.3)
        assert time.monotonic() - began < 2.3
        assert len({caller.result().tobytes() for caller in callers}) == 40
    assert_idle(sd15)


def test_full_queue_refuses_at_once(sd15: Served) -> None:
    large = CAT | {"num_images_per_prompt": 64, "num_inference_steps": 300, "timeout": 10.0}
    with ThreadPoolExecutor(2) as pool, Client(sd15.server.grpc_address, max_retries=0) as impatient:
        callers = [pool.submit(sd15.generate, **large) for _ in range(2)]
        state = 'imprompt_rows{model="sd15_denoiser",state='
        wait_for(sd15, lambda: [total(sd15, f'{state}"{name}"') for name in ("running", "waiting")] == [128, 128])
        began = time.monotonic()
        with pytest.raises(Overloaded, match="the limit is 128") as refused:
            impatient.generate(model="sd15", **CAT)
        assert time.monotonic() - began < 2.0
        assert refused.value.retry_after is not None
        for caller in callers:
            with pytest.raises(DeadlineExceeded):
                caller.result()
    assert_idle(sd15)


def total(sd15: Served, start: str) -> float:
    """Sum the metrics whose names start with `start`."""
    return sum(value for name, value in sd15.metrics().items() if name.startswith(start))


def wait_for(sd15: Served, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < end, busy(sd15)
        time.sleep(0.02)


def assert_idle(sd15: Served) -> None:
    """Check that no jobs or requests remain, and that the next request is served."""
    end = time.monotonic() + 5.0
    while busy(sd15) and time.monotonic() < end:
        time.sleep(0.02)
    assert not busy(sd15)
    request(sd15, {})


def busy(sd15: Served) -> dict[str, float]:
    gauges = ("imprompt_jobs{", "imprompt_rows{", "imprompt_requests_in_flight{")
    return {name: value for name, value in sd15.metrics().items() if name.startswith(gauges) and value}
