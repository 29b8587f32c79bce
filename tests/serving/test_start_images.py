"""Image-to-image and inpainting with an image prompt on a running Triton: the same pictures as diffusers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline

from imprompt import InvalidRequest
from parity import assert_different, assert_same
from served import Served
from tiny import images, oracle

STATUE, OTHER = images.photo(1), images.photo(2)
SCENE = images.photo(7, size=(96, 72))
SMALL: dict[str, Any] = {"prompt": "a photo of a cat", "num_inference_steps": 6}


def load(served: Served, cls: Any, scheduler: str | None = None) -> Any:
    """Load a diffusers pipeline with the first adapter of the bundle at scale 0.6."""
    pipe = oracle.pipeline(served.bundle.checkpoints / "base", served.bundle.adapters[:1], cls, scheduler)
    pipe.set_ip_adapter_scale(0.6)
    return pipe


def generate(served: Served, **arguments: Any) -> Any:
    return served.generate(ip_adapter_image={"plain": STATUE}, ip_adapter_scale=0.6, **{"seed": 0, **arguments})


@pytest.mark.parametrize(
    ("scheduler", "arguments"),
    [
        ("DDIMScheduler", {}),
        ("PNDMScheduler", {"strength": 0.5}),
        ("EulerDiscreteScheduler", {"strength": 0.7}),
        ("HeunDiscreteScheduler", {"strength": 0.6}),
        ("DPMSolverMultistepScheduler", {"strength": 0.7}),
        ("EulerAncestralDiscreteScheduler", {"num_images_per_prompt": 2}),
        ("DDIMScheduler", {"num_images_per_prompt": 2, "seed": [4, 5], "strength": 1.0}),
        ("DDIMScheduler", {"prompt": ["a cat", "a dog"], "image": [SCENE, images.photo(8, size=(96, 72))]}),
    ],
)
def test_image_to_image(sd15: Served, scheduler: str, arguments: dict[str, Any]) -> None:
    arguments = {**SMALL, "image": SCENE, **arguments}
    expected = oracle.generate(
        load(sd15, StableDiffusionImg2ImgPipeline, scheduler), ip_adapter_image=STATUE, **arguments
    )
    result = generate(sd15, scheduler=scheduler, **arguments)
    assert_same(result, expected)
    assert result.images[0].size == (96, 72)
    assert_different(result, generate(sd15, scheduler=scheduler, **{**arguments, "image": OTHER.resize((96, 72))}))


@pytest.mark.parametrize("name", ["sd15", "inpaint"])
@pytest.mark.parametrize(
    ("scheduler", "arguments"),
    [
        ("DDIMScheduler", {}),
        ("EulerAncestralDiscreteScheduler", {"strength": 0.7}),
        ("PNDMScheduler", {"strength": 0.5, "num_images_per_prompt": 2, "seed": [4, 5]}),
        ("DDIMScheduler", {"height": 72, "width": 104, "guidance_scale": 1.0}),
        ("DDIMScheduler", {"padding_mask_crop": 8}),
    ],
)
def test_inpainting(served: Any, name: str, scheduler: str, arguments: dict[str, Any]) -> None:
    server = served(name)
    mask = images.mask("circle", size=SCENE.size)
    arguments = {**SMALL, "image": SCENE, "mask_image": mask, **arguments}
    pipe = load(server, StableDiffusionInpaintPipeline, scheduler)
    result = generate(server, scheduler=scheduler, **arguments)
    assert_same(result, oracle.generate(pipe, ip_adapter_image=STATUE, **arguments))
    other = {**arguments, "mask_image": images.mask("top", size=SCENE.size)}
    assert_different(result, generate(server, scheduler=scheduler, **other))


@pytest.mark.parametrize("mode", ["L", "1", "RGB"])
def test_mask_of_another_size_is_resized(sd15: Served, mode: str) -> None:
    arguments = {**SMALL, "image": SCENE, "mask_image": images.mask("circle", size=(40, 40)).convert(mode)}
    expected = oracle.generate(load(sd15, StableDiffusionInpaintPipeline), ip_adapter_image=STATUE, **arguments)
    assert_same(generate(sd15, **arguments), expected)


def test_unmasked_pixels_are_kept(sd15: Served) -> None:
    scene = SCENE.resize((64, 64))
    result = sd15.generate(**SMALL, image=scene, mask_image=images.mask("left"), padding_mask_crop=0, seed=0)
    difference = np.abs(np.asarray(result.images[0]).astype(int) - np.asarray(scene.convert("RGB")))
    assert difference[:, 36:].max() <= 1
    assert difference[:, :28].mean() > 3


@pytest.mark.parametrize(
    ("parameter", "arguments"),
    [
        ("mask_image", {"mask_image": images.mask("left")}),
        ("strength", {"image": SCENE, "strength": 0.0}),
        ("strength", {"image": SCENE, "strength": 1.5}),
        ("strength", {"image": SCENE, "strength": 0.1}),
        ("strength", {"strength": 0.5}),
        ("image", {"image": images.photo(1, size=(2048, 64))}),
        ("image", {"image": [SCENE, SCENE]}),
        ("padding_mask_crop", {"image": SCENE, "padding_mask_crop": 4}),
        ("mask_image", {"image": SCENE, "mask_image": images.mask("left", size=(40, 40)), "padding_mask_crop": 4}),
    ],
)
def test_refusals_of_start_images_name_the_parameter(sd15: Served, parameter: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        sd15.generate(**SMALL, **arguments)
    assert caught.value.parameter == parameter


def test_inpainting_model_requires_a_mask(served: Any) -> None:
    with pytest.raises(InvalidRequest, match="mask_image"):
        served("inpaint").generate(**SMALL)
