"""Custom steps, parts of the denoising, and latents as start pictures: the same pictures as diffusers."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)

from imprompt import InvalidRequest
from imprompt_serving.scheduler_names import CUSTOM_STEPS, SCHEDULERS
from parity import assert_different, assert_same
from served import Served
from tiny import images, oracle

SMALL: dict[str, Any] = {"prompt": "a photo of a cat", "height": 64, "width": 64}
SCENE = images.photo(7, size=(64, 64))
TIMESTEPS, SIGMAS = [900, 700, 420, 150], [12.0, 6.0, 2.0, 0.5]


@pytest.fixture(scope="module")
def sdxl(served: Any) -> Served:
    return served("sdxl")


def load(served: Served, cls: Any, scheduler: str | None = None, **config: Any) -> Any:
    return oracle.pipeline(served.bundle.checkpoints / "base", (), cls, scheduler, config)


def test_schedulers_that_take_custom_steps() -> None:
    for parameter, names in CUSTOM_STEPS.items():
        taking = [
            name
            for name in SCHEDULERS
            if parameter in inspect.signature(getattr(diffusers, name).set_timesteps).parameters
        ]
        assert list(names) == taking


@pytest.mark.parametrize("scheduler", CUSTOM_STEPS["timesteps"])
def test_timesteps(sd15: Served, scheduler: str) -> None:
    timesteps = TIMESTEPS
    if scheduler == "LCMScheduler":  # which only takes timesteps of its training
        timesteps = [999, 759, 499, 259]
    pipe = load(sd15, StableDiffusionPipeline, scheduler)
    arguments = {**SMALL, "timesteps": timesteps}
    result = sd15.generate(**arguments, scheduler=scheduler, seed=0)
    assert_same(result, oracle.generate(pipe, **arguments))
    if scheduler != "LCMScheduler":
        assert_different(result, sd15.generate(**SMALL, num_inference_steps=4, scheduler=scheduler, seed=0))


def test_sigmas(sd15: Served) -> None:
    pipe = load(sd15, StableDiffusionPipeline, "EulerDiscreteScheduler")
    arguments = {**SMALL, "sigmas": SIGMAS}
    result = sd15.generate(**arguments, scheduler="EulerDiscreteScheduler", seed=0)
    assert_same(result, oracle.generate(pipe, **arguments))
    assert_different(result, sd15.generate(**SMALL, num_inference_steps=4, scheduler="EulerDiscreteScheduler", seed=0))


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_timesteps_with_a_strength(sd15: Served, scheduler: str) -> None:
    pipe = load(sd15, StableDiffusionImg2ImgPipeline, scheduler)
    arguments = {"prompt": "a cat", "image": SCENE, "strength": 0.6, "timesteps": [900, 800, 600, 420, 150]}
    result = sd15.generate(**arguments, scheduler=scheduler, seed=0)
    assert_same(result, oracle.generate(pipe, **arguments))


@pytest.mark.parametrize("noise_levels", ["karras", "exponential", "beta"])
def test_noise_levels_by_scheduler_config(sd15: Served, noise_levels: str) -> None:
    config = {f"use_{noise_levels}_sigmas": True}
    pipe = load(sd15, StableDiffusionPipeline, "EulerDiscreteScheduler", **config)
    arguments = {**SMALL, "num_inference_steps": 5}
    result = sd15.generate(**arguments, scheduler="EulerDiscreteScheduler", scheduler_config=config, seed=0)
    assert_same(result, oracle.generate(pipe, **arguments))
    assert_different(result, sd15.generate(**arguments, scheduler="EulerDiscreteScheduler", seed=0))


@pytest.mark.parametrize(
    "scheduler", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_base_and_refiner(sdxl: Served, scheduler: str) -> None:
    """The base returns latents, and a second call continues with them; here both are the same bundle."""
    base, refiner = (
        load(sdxl, cls, scheduler) for cls in (StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline)
    )
    prompt = {"prompt": "a photo of a cat", "num_inference_steps": 6}
    generator = torch.Generator("cpu").manual_seed(0)
    latents = base(**prompt, height=64, width=64, denoising_end=0.6, output_type="latent", generator=generator).images
    expected = oracle.generate(refiner, **prompt, image=latents, denoising_start=0.6)
    given = {**prompt, "scheduler": scheduler, "seed": 0}
    part = sdxl.generate(**given, height=64, width=64, denoising_end=0.6, output_type="latent")
    np.testing.assert_allclose(part.latents, latents.numpy(), atol=5e-3)
    result = sdxl.generate(**given, image=part.latents, denoising_start=0.6)
    assert_same(result, expected)
    whole = sdxl.generate(**given, height=64, width=64)
    if scheduler == "EulerDiscreteScheduler":  # the others keep a state between steps
        assert_same(result, np.stack([np.asarray(image) for image in whole.images]))
    assert_different(result, sdxl.generate(**given, image=part.latents, denoising_start=0.3))


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_a_middle_part_of_a_picture(sdxl: Served, scheduler: str) -> None:
    pipe = load(sdxl, StableDiffusionXLImg2ImgPipeline, scheduler)
    window = {"denoising_start": 0.3, "denoising_end": 0.8, "image": SCENE, "num_inference_steps": 6, "prompt": "a cat"}
    assert_same(sdxl.generate(**window, scheduler=scheduler, seed=0), oracle.generate(pipe, **window))


def test_a_part_of_inpainting(sdxl: Served) -> None:
    pipe = load(sdxl, StableDiffusionXLInpaintPipeline, "EulerDiscreteScheduler")
    window = {"denoising_start": 0.3, "num_inference_steps": 6, "image": SCENE, "mask_image": images.mask("circle")}
    result = sdxl.generate(**SMALL, **window, scheduler="EulerDiscreteScheduler", seed=0)
    assert_same(result, oracle.generate(pipe, **SMALL, **window))


@pytest.mark.parametrize("arguments", [{}, {"num_images_per_prompt": 2, "seed": [3, 8]}])
def test_latents_as_start_picture(sd15: Served, arguments: dict[str, Any]) -> None:
    pipe = load(sd15, StableDiffusionImg2ImgPipeline, "DDIMScheduler")
    latents = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(5))
    arguments = {"prompt": "a cat", "image": latents, "strength": 0.5, "num_inference_steps": 6, "seed": 0, **arguments}
    expected = oracle.generate(pipe, **arguments)
    result = sd15.generate(**arguments, scheduler="DDIMScheduler")
    assert result.images[0].size == (96, 64)
    assert_same(result, expected)


def test_refused_steps(sd15: Served) -> None:
    with pytest.raises(
        InvalidRequest, match=r"^sigmas: UniPCMultistepScheduler failed: Passing `sigmas` is only supported"
    ):
        sd15.generate(**SMALL, sigmas=SIGMAS, scheduler="UniPCMultistepScheduler")
    for parameter, arguments in (
        ("timesteps", {"timesteps": TIMESTEPS, "scheduler": "DDIMScheduler"}),
        ("sigmas", {"sigmas": SIGMAS, "scheduler": "HeunDiscreteScheduler"}),
    ):
        with pytest.raises(InvalidRequest, match=f"does not take {parameter}; use one of") as caught:
            sd15.generate(**SMALL, **arguments)
        assert caught.value.parameter == parameter
