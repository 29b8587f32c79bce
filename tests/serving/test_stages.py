"""Measuring the seconds of each stage."""

from __future__ import annotations

import asyncio

import pytest

from imprompt_serving.pipeline.stages import Stages


def test_overlapping_calls_of_a_stage_count_once() -> None:
    stages = Stages()

    async def call(delay: float, seconds: float) -> None:
        await asyncio.sleep(delay)
        with stages.measure("image_encoder"):
            await asyncio.sleep(seconds)

    async def calls() -> None:
        await asyncio.gather(call(0, 0.1), call(0.05, 0.1), call(0.05, 0.02), call(0.3, 0.1))

    asyncio.run(calls())
    assert stages.seconds["image_encoder"] == pytest.approx(0.25, abs=0.045)


def test_failing_stage_is_measured() -> None:
    stages = Stages()
    for _ in range(2):
        with pytest.raises(ValueError, match="no"), stages.measure("vae_decoder"):
            raise ValueError("no")
    with stages.measure("vae_decoder"):
        pass
    assert 0 < stages.seconds["vae_decoder"] < 0.1
