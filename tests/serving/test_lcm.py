"""Instant generation: a fused LCM-LoRA; and the safety checker, which that base has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetImg2ImgPipeline

from parity import assert_different, assert_same
from served import Served
from tiny import images, oracle

STATUE = images.photo(1)
INSTANT: dict[str, Any] = {"prompt": "a photo of a cat", "num_inference_steps": 4, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def lcm(served: Any) -> Served:
    return served("lcm")


def load(lcm: Served, *arguments: Any, lora: bool = True, **more: Any) -> Any:
    pipe = lcm.bundle.oracle(*arguments, scheduler="LCMScheduler", **{"safety_checker": True, **more})
    if lora:
        pipe.load_lora_weights(lcm.bundle.checkpoints / "lora")
    pipe.set_ip_adapter_scale(0.6)
    return pipe


def generate(lcm: Served, **arguments: Any) -> Any:
    instant = {**INSTANT, "scheduler": "LCMScheduler", "ip_adapter_image": STATUE, "ip_adapter_scale": 0.6, "seed": 0}
    return lcm.generate(**{**instant, **arguments})


def test_four_steps_without_guidance(lcm: Served) -> None:
    pipe = load(lcm)
    seeds = list(range(6))
    arguments = {**INSTANT, "num_images_per_prompt": len(seeds)}
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    output = pipe(**arguments, ip_adapter_image=STATUE, generator=generators)
    result = generate(lcm, num_images_per_prompt=len(seeds), seed=seeds)
    assert_same(result, np.stack([np.asarray(image) for image in output.images]))
    assert result.nsfw_content_detected == output.nsfw_content_detected
    assert any(output.nsfw_content_detected), "no picture is flagged: this proves nothing"
    assert not all(output.nsfw_content_detected), "every picture is flagged: this proves nothing"
    for picture, flagged in zip(result.images, result.nsfw_content_detected, strict=True):
        assert (np.asarray(picture).max() == 0) == flagged


def test_the_lora_matters(lcm: Served) -> None:
    seeds = list(range(6))
    result = generate(lcm, num_images_per_prompt=len(seeds), seed=seeds)
    without = oracle.generate(
        load(lcm, lora=False, safety_checker=False),
        ip_adapter_image=STATUE,
        seed=seeds,
        num_images_per_prompt=len(seeds),
        **INSTANT,
    )
    safe = [index for index, flagged in enumerate(result.nsfw_content_detected) if not flagged]
    assert_different([result.images[index] for index in safe], without[safe])


def test_guidance_is_an_input_of_a_distilled_unet(lcm: Served) -> None:
    seeds = list(range(6))
    arguments = {**INSTANT, "guidance_scale": 6.0, "num_images_per_prompt": len(seeds), "seed": seeds}
    result = generate(lcm, **arguments)
    assert_same(result, oracle.generate(load(lcm), ip_adapter_image=STATUE, **arguments))
    other = generate(lcm, **{**arguments, "guidance_scale": 1.0})
    flags = zip(result.nsfw_content_detected, other.nsfw_content_detected, strict=True)
    safe = [index for index, flagged in enumerate(flags) if not any(flagged)]
    assert safe, "every picture is flagged: this proves nothing"
    assert_different([result.images[index] for index in safe], [other.images[index] for index in safe])


def test_no_guidance_is_an_input_with_a_controlnet_and_a_start_picture(lcm: Served) -> None:
    """diffusers' pipeline for both does not know distilled UNets: it runs two branches and embeds no guidance."""
    net = ControlNetModel.from_pretrained(lcm.bundle.checkpoints / "depth")
    pipe = load(lcm, StableDiffusionControlNetImg2ImgPipeline, controlnet=net)
    seeds = list(range(6))
    arguments = {**INSTANT, "guidance_scale": 3.0, "num_images_per_prompt": len(seeds), "seed": seeds}
    arguments |= {"image": images.photo(0).resize((64, 64)), "control_image": images.control_image("depth")}
    result = generate(lcm, **arguments)
    assert_same(result, oracle.generate(pipe, ip_adapter_image=STATUE, **arguments))
    assert not all(result.nsfw_content_detected), "every picture is flagged: this proves nothing"
