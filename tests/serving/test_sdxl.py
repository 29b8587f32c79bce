"""SDXL with image prompts on a running Triton: the same pictures as diffusers."""

from __future__ import annotations

from typing import Any

import pytest
from diffusers import (
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)

from parity import assert_different, assert_same
from served import Served
from tiny import images, oracle

STATUE = images.photo(1)
SCENE = images.photo(7, size=(64, 64))
SMALL: dict[str, Any] = {"prompt": "a photo of a cat", "num_inference_steps": 4}


@pytest.fixture(scope="module")
def sdxl(served: Any) -> Served:
    return served("sdxl")


def load(sdxl: Served, cls: Any = StableDiffusionXLPipeline, scale: Any = 0.6, adapter: int = 0) -> Any:
    pipe = oracle.pipeline(sdxl.bundle.checkpoints / "base", [sdxl.bundle.adapters[adapter]], cls)
    pipe.set_ip_adapter_scale(scale)
    return pipe


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({}, id="plain"),
        pytest.param({"height": 64, "width": 96, "num_images_per_prompt": 2}, id="not square, two pictures"),
        pytest.param({"negative_prompt": "dark"}, id="negative prompt"),
        pytest.param({"negative_prompt": ""}, id="empty negative prompt"),
        pytest.param({"prompt_2": "in the style of woodcut", "negative_prompt": "a", "negative_prompt_2": "b"}, id="2"),
        pytest.param({"guidance_scale": 1.0}, id="no guidance"),
        pytest.param({"clip_skip": 2, "negative_prompt": "dark"}, id="clip skip"),
        pytest.param({"prompt_2": "", "negative_prompt": "dark", "negative_prompt_2": ""}, id="empty second prompts"),
        pytest.param(
            {"original_size": (128, 96), "crops_coords_top_left": (8, 16), "target_size": (80, 72)}, id="sizes"
        ),
        pytest.param(
            {
                "negative_original_size": (32, 32),
                "negative_crops_coords_top_left": (4, 4),
                "negative_target_size": (64, 48),
            },
            id="negative sizes",
        ),
        pytest.param(
            {"negative_original_size": (32, 32), "negative_target_size": (64, 48), "num_images_per_prompt": 2},
            id="negative sizes, two pictures",
        ),
    ],
)
def test_text_to_image(sdxl: Served, arguments: dict[str, Any]) -> None:
    arguments = {**SMALL, **arguments}
    expected = oracle.generate(load(sdxl), ip_adapter_image=STATUE, **arguments)
    assert_same(sdxl.generate(**arguments, ip_adapter_image={"plain": STATUE}, ip_adapter_scale=0.6, seed=0), expected)


@pytest.mark.parametrize(
    "scale",
    [
        pytest.param({"up": {"block_0": [0.0, 1.0, 0.0]}}, id="style"),
        pytest.param({"down": {"block_2": [0.0, 1.0]}, "up": {"block_0": [0.0, 1.0, 0.0]}}, id="style and layout"),
    ],
)
def test_scales_by_block(sdxl: Served, scale: dict[str, Any]) -> None:
    expected = oracle.generate(load(sdxl, scale=scale), ip_adapter_image=STATUE, **SMALL)
    result = sdxl.generate(**SMALL, ip_adapter_image={"plain": STATUE}, ip_adapter_scale=scale, seed=0)
    assert_same(result, expected)
    assert_different(result, sdxl.generate(**SMALL, ip_adapter_image={"plain": STATUE}, ip_adapter_scale=1.0, seed=0))


def test_weight_type_style_uses_the_instantstyle_blocks(sdxl: Served) -> None:
    arguments = {**SMALL, "ip_adapter_image": {"plain": STATUE}, "seed": 0}
    style = sdxl.generate(**arguments, ip_adapter_weight_type="style")
    pipe = load(sdxl, scale={"up": {"block_0": [0.0, 1.0, 0.0]}})
    assert_same(style, oracle.generate(pipe, ip_adapter_image=STATUE, **SMALL))


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"negative_original_size": (32, 32), "crops_coords_top_left": (8, 16), "num_images_per_prompt": 2},
    ],
)
def test_image_to_image(sdxl: Served, sizes: dict[str, Any]) -> None:
    arguments = {**SMALL, "image": SCENE, "strength": 0.6, "num_inference_steps": 6, **sizes}
    expected = oracle.generate(load(sdxl, StableDiffusionXLImg2ImgPipeline), ip_adapter_image=STATUE, **arguments)
    assert_same(sdxl.generate(**arguments, ip_adapter_image={"plain": STATUE}, ip_adapter_scale=0.6, seed=0), expected)


def test_inpainting(sdxl: Served) -> None:
    mask = images.mask("circle")
    arguments = {**SMALL, "image": SCENE, "mask_image": mask, "height": 64, "width": 64}
    expected = oracle.generate(load(sdxl, StableDiffusionXLInpaintPipeline), ip_adapter_image=STATUE, **arguments)
    assert_same(sdxl.generate(**arguments, ip_adapter_image={"plain": STATUE}, ip_adapter_scale=0.6, seed=0), expected)


def test_adapter_with_the_vit_h_encoder(sdxl: Served) -> None:
    pipe = load(sdxl, adapter=1)
    styles = images.photos(3, seed=50)
    arguments = {**SMALL, "ip_adapter_scale": 0.6, "seed": 0}
    result = sdxl.generate(**arguments, ip_adapter_image={"plus": styles})
    assert_same(result, oracle.generate(pipe, ip_adapter_image=[styles], **SMALL))
    assert_different(result, sdxl.generate(**arguments, ip_adapter_image={"plus": styles[:1]}))
