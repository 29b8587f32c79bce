"""Text-to-image with an image prompt on a running Triton: the same pictures as diffusers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from imprompt_serving.scheduler_names import SCHEDULERS
from parity import assert_different, assert_same
from served import Served
from tiny import images, oracle

STATUE, OTHER = images.photo(1), images.photo(2, size=(120, 80))
UNSEEDED = {"DPMSolverSDEScheduler"}
"""diffusers draws their noise from a separate generator, randomly seeded unless `noise_sampler_seed` is set."""


@pytest.fixture(scope="module")
def plain(served: Any) -> Any:
    """A diffusers pipeline with only the plain adapter, for a given scheduler."""
    made = served("sd15").bundle

    def pipe(scheduler: str = "DDIMScheduler", scale: float = 0.6, **config: Any) -> Any:
        loaded = oracle.pipeline(
            made.checkpoints / "base", made.adapters[:1], StableDiffusionPipeline, scheduler, config
        )
        loaded.set_ip_adapter_scale(scale)
        return loaded

    return pipe


SMALL: dict[str, Any] = {"prompt": "a photo of a cat", "num_inference_steps": 4, "height": 64, "width": 64}


def test_same_picture_with_each_scheduler(sd15: Served, plain: Any) -> None:
    for scheduler in SCHEDULERS:
        config = {"noise_sampler_seed": 5} if scheduler in UNSEEDED else {}
        expected = oracle.generate(plain(scheduler, **config), ip_adapter_image=STATUE, **SMALL)
        result = sd15.generate(
            **SMALL,
            ip_adapter_image={"plain": STATUE},
            ip_adapter_scale=0.6,
            scheduler=scheduler,
            scheduler_config=config,
            seed=0,
        )
        try:
            assert_same(result, expected)
        except AssertionError as error:
            raise AssertionError(f"{scheduler}: {error}") from None


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({}, id="plain"),
        pytest.param({"width": 96}, id="not square"),
        pytest.param({"height": 72, "width": 104}, id="not a multiple of 64"),
        pytest.param({"num_images_per_prompt": 2}, id="two pictures, one seed"),
        pytest.param({"num_images_per_prompt": 2, "seed": [3, 8]}, id="two pictures, a seed each"),
        pytest.param({"prompt": ["a cat", "a big dog"], "negative_prompt": ["blue", "red"]}, id="two prompts"),
        pytest.param({"negative_prompt": "dark, blurry"}, id="negative prompt"),
        pytest.param({"guidance_scale": 1.0}, id="no guidance"),
        pytest.param({"guidance_rescale": 0.7}, id="rescaled guidance"),
        pytest.param({"eta": 0.8}, id="eta"),
        pytest.param({"prompt": "a cat " * 100}, id="a prompt that is cut"),
        pytest.param({"prompt": "Ünïcode 猫, (weights:1.2)\n newline"}, id="unusual characters"),
    ],
)
def test_same_picture(sd15: Served, plain: Any, arguments: dict[str, Any]) -> None:
    arguments = {**SMALL, "seed": 0, **arguments}
    expected = oracle.generate(plain(), ip_adapter_image=STATUE, **arguments)
    result = sd15.generate(
        **arguments, ip_adapter_image={"plain": STATUE}, ip_adapter_scale=0.6, scheduler="DDIMScheduler"
    )
    assert_same(result, expected)


@pytest.mark.parametrize("layers", [1, 3])
def test_clip_skip(sd15: Served, plain: Any, layers: int) -> None:
    """Skips up to all three layers; the negative prompt skips none."""
    pipe = plain()
    object.__setattr__(pipe.text_encoder, "text_model", pipe.text_encoder)  # where diffusers 0.42 looks for its norm
    arguments = {**SMALL, "clip_skip": layers, "negative_prompt": "dark, blurry"}
    expected = oracle.generate(pipe, ip_adapter_image=STATUE, **arguments)
    arguments |= {"ip_adapter_image": {"plain": STATUE}, "ip_adapter_scale": 0.6, "seed": 0}
    assert_same(sd15.generate(**arguments, scheduler="DDIMScheduler"), expected)


def test_scale_0_with_the_default_scheduler(sd15: Served) -> None:
    pipe = oracle.pipeline(sd15.bundle.checkpoints / "base", sd15.bundle.adapters[:1])
    pipe.set_ip_adapter_scale(0.0)
    result = sd15.generate(**SMALL, ip_adapter_image={"plain": STATUE}, ip_adapter_scale=0.0, seed=0)
    assert_same(result, oracle.generate(pipe, ip_adapter_image=STATUE, **SMALL))


def test_no_image_prompt(sd15: Served) -> None:
    pipe = oracle.pipeline(sd15.bundle.checkpoints / "base")
    assert_same(sd15.generate(**SMALL, seed=0), oracle.generate(pipe, **SMALL))


def test_several_images_in_one_image_prompt(sd15: Served, plain: Any) -> None:
    expected = oracle.generate(plain(), ip_adapter_image=[[STATUE, OTHER]], **SMALL)
    result = sd15.generate(
        **SMALL, ip_adapter_image={"plain": [STATUE, OTHER]}, ip_adapter_scale=0.6, scheduler="DDIMScheduler", seed=0
    )
    assert_same(result, expected)


def test_scheduler_config(sd15: Served, plain: Any) -> None:
    config = {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++", "timestep_spacing": "trailing"}
    expected = oracle.generate(plain("DPMSolverMultistepScheduler", **config), ip_adapter_image=STATUE, **SMALL)
    arguments = {**SMALL, "ip_adapter_image": {"plain": STATUE}, "ip_adapter_scale": 0.6, "seed": 0}
    result = sd15.generate(**arguments, scheduler="DPMSolverMultistepScheduler", scheduler_config=config)
    assert_same(result, expected)
    assert_different(result, sd15.generate(**arguments, scheduler="DPMSolverMultistepScheduler"))


def test_wrong_inputs_would_be_noticed(sd15: Served) -> None:
    arguments = {**SMALL, "ip_adapter_image": {"plain": STATUE}, "ip_adapter_scale": 0.6, "seed": 0}
    result = sd15.generate(**arguments)
    for other in (
        {"ip_adapter_scale": 0.7},
        {"ip_adapter_image": {"plain": OTHER}},
        {"ip_adapter_image": {"plus": STATUE}},
        {"prompt": "a photo of a dog"},
        {"negative_prompt": "dark"},
        {"seed": 1},
        {"clip_skip": 1},
    ):
        assert_different(result, sd15.generate(**{**arguments, **other}))


def test_reported_random_seeds_reproduce_the_pictures(sd15: Served) -> None:
    first = sd15.generate(**SMALL, num_images_per_prompt=2)
    assert len(set(first.seeds)) == 2
    again = sd15.generate(**SMALL, num_images_per_prompt=2, seed=first.seeds)
    assert_same(again, np.stack([np.asarray(image) for image in first.images]))


def test_latents_and_timings(sd15: Served) -> None:
    pipe = oracle.pipeline(sd15.bundle.checkpoints / "base")
    latents = sd15.generate(**SMALL, seed=0, output_type="latent").latents
    expected = pipe(**SMALL, generator=torch.Generator("cpu").manual_seed(0), output_type="latent").images.numpy()
    np.testing.assert_allclose(latents, expected, atol=2e-3)
    timings = sd15.generate(**SMALL, ip_adapter_image={"plain": STATUE}).timings
    stages = {"preprocess", "image_encoder", "text_encoder", "queue", "denoise", "vae_decoder", "total"}
    assert stages <= timings.keys()
    assert timings["denoise"] <= timings["total"]


def test_concurrent_requests_do_not_affect_each_other(sd15: Served) -> None:
    requests: list[dict[str, Any]] = [
        {**SMALL, "seed": 1, "ip_adapter_image": {"plain": STATUE}, "ip_adapter_scale": 0.8},
        {**SMALL, "seed": 2, "num_inference_steps": 7, "scheduler": "EulerDiscreteScheduler"},
        {**SMALL, "seed": 3, "width": 96, "scheduler": "HeunDiscreteScheduler"},
        {**SMALL, "seed": 4, "num_images_per_prompt": 6, "ip_adapter_image": {"plus": [STATUE, OTHER]}},
        {**SMALL, "seed": 5, "guidance_scale": 1.0, "ip_adapter_image": {"full_face": OTHER, "plain": STATUE}},
    ]
    alone = [sd15.generate(**request) for request in requests]
    with ThreadPoolExecutor(len(requests)) as threads:
        together = list(threads.map(lambda request: sd15.generate(**request), requests))
    for one, other in zip(alone, together, strict=True):
        assert_same(other, np.stack([np.asarray(image) for image in one.images]))
