"""The warm-up of a denoiser: the jobs that it runs, and an engine that takes too long."""

from __future__ import annotations

import threading
from typing import Any

import msgspec
import pytest
import torch

from imprompt_bench.rig import sd15
from imprompt_serving.denoiser import warm_up
from imprompt_serving.denoiser.conditioning import Conditioner
from imprompt_serving.denoiser.warm_up import WarmUpJob, warm_up_jobs
from imprompt_serving.errors import RequestError
from imprompt_serving.specs import CallRows, Motion


def test_a_warm_up_that_takes_too_long_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    release, bundle = threading.Event(), sd15(rows=2)
    before = set(threading.enumerate())

    def networks(parts: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        threading.Timer(0.5, release.set).start()
        assert release.wait(10)
        return torch.zeros_like(inputs["sample"])

    monkeypatch.setattr(warm_up, "WAIT_S", 0.1)
    with pytest.raises(RequestError, match=r"did not finish a step within 0\.1 seconds"):
        warm_up.warm_up(bundle, Conditioner(bundle, {}), networks, torch.device("cpu"), CallRows(2))
    assert not {t.name for t in set(threading.enumerate()) - before if not isinstance(t, threading.Timer)}


def test_every_job_takes_one_step_with_a_preview(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, call_rows = sd15(rows=2), CallRows(2, True)
    rows: list[int] = []
    shown: list[tuple[int, ...]] = []

    def networks(parts: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        rows.append(len(inputs["sample"]))
        return torch.zeros_like(inputs["sample"])

    monkeypatch.setattr(warm_up, "previews", lambda predicted, bundle: shown.append(tuple(predicted.shape)))
    warm_up.warm_up(bundle, Conditioner(bundle, {}), networks, torch.device("cpu"), call_rows)
    jobs = list(warm_up_jobs(bundle, call_rows))
    assert rows == [job.prompts * (2 if job.guided else 1) for job in jobs]
    assert shown == [(job.prompts, 4, job.size[0] // 8, job.size[1] // 8) for job in jobs]


FIRST = WarmUpJob(size=(64, 64), guided=True, masks=True, loras=True)
USUAL = (512, 512)


def test_without_buckets_one_small_job_is_enough() -> None:
    assert list(warm_up_jobs(sd15(rows=4, adapters=("plain",)), CallRows(4))) == [FIRST]


def test_every_bucket_is_run_with_and_without_image_prompts() -> None:
    found = list(warm_up_jobs(sd15(rows=2, adapters=("plain",)), CallRows(2, True)))
    assert found == [
        FIRST,
        *(
            WarmUpJob(size=USUAL, prompts=rows, **use)
            for rows in (1, 2)
            for use in ({"controls": True}, {"adapters": False})
        ),
    ]


def test_clips_have_the_usual_length_within_a_window() -> None:
    """A call of 16 rows takes one or two clips of 8 frames."""
    bundle = msgspec.structs.replace(sd15(rows=16), motion=Motion(window=8))
    clips = [job for job in warm_up_jobs(bundle, CallRows(16, True)) if job.frames is not None]
    assert clips == [WarmUpJob(size=USUAL, prompts=rows, frames=8, controls=True) for rows in (1, 2)]
