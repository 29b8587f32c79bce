"""The refiner of SDXL on a running Triton: the same pictures as diffusers, also after a base in another bundle."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline, StableDiffusionXLPipeline

from imprompt import InvalidRequest
from parity import assert_different, assert_same
from served import Served
from tiny import images, oracle

SCENE = images.photo(3, size=(64, 64))
PROMPT: dict[str, Any] = {"prompt": "a photo of a cat", "num_inference_steps": 5}
START: dict[str, Any] = {**PROMPT, "image": SCENE, "strength": 0.6}


@pytest.fixture
def refiner(served: Callable[[str], Served]) -> Served:
    return served("sdxl_refiner")


@cache
def load(server: Served, cls: Any) -> Any:
    return oracle.pipeline(server.bundle.checkpoints / "base", (), cls)


@pytest.mark.parametrize("end", [0.8, 0.4])
def test_refiner_continues_with_the_latents_of_a_base(
    served: Callable[[str], Served], refiner: Served, end: float
) -> None:
    base = served("sdxl")
    first, second = load(base, StableDiffusionXLPipeline), load(refiner, StableDiffusionXLImg2ImgPipeline)
    part = {**PROMPT, "height": 64, "width": 64, "denoising_end": end, "output_type": "latent"}
    latents = first(**part, generator=torch.Generator("cpu").manual_seed(0)).images
    rest = {**PROMPT, "denoising_start": end, "aesthetic_score": 7.0}
    expected = oracle.generate(second, **rest, image=latents)
    found = base.generate(**part, seed=0)
    np.testing.assert_allclose(found.latents, latents.numpy(), atol=5e-3)
    result = refiner.generate(**rest, image=found.latents, seed=0)
    assert_same(result, expected)
    if end < 0.5:  # a single step of another model changes little
        assert_different(result, base.generate(**rest | {"aesthetic_score": None}, image=found.latents, seed=0))


@pytest.mark.parametrize(
    "conditions",
    [
        pytest.param({}, id="defaults"),
        pytest.param({"aesthetic_score": 2.0, "negative_aesthetic_score": 9.5}, id="scores"),
        pytest.param(
            {
                "original_size": (128, 96),
                "crops_coords_top_left": (8, 16),
                "negative_original_size": (32, 32),
                "negative_crops_coords_top_left": (4, 2),
                "num_images_per_prompt": 2,
            },
            id="sizes",
        ),
        pytest.param({"guidance_scale": 1.0, "aesthetic_score": 3.0}, id="no guidance"),
    ],
)
def test_image_to_image(refiner: Served, conditions: dict[str, Any]) -> None:
    arguments = {**START, **conditions}
    result = refiner.generate(**arguments, seed=0)
    assert_same(result, oracle.generate(load(refiner, StableDiffusionXLImg2ImgPipeline), **arguments))


@pytest.mark.parametrize("score", [{"aesthetic_score": 0.0}, {"negative_aesthetic_score": 10.0}], ids=str)
def test_scores_matter(refiner: Served, score: dict[str, float]) -> None:
    assert_different(refiner.generate(**START, seed=0), refiner.generate(**START, **score, seed=0))


def test_inpainting(refiner: Served) -> None:
    arguments = {**START, "mask_image": images.mask("circle"), "height": 64, "width": 64, "aesthetic_score": 8.0}
    expected = oracle.generate(load(refiner, StableDiffusionXLInpaintPipeline), **arguments)
    assert_same(refiner.generate(**arguments, seed=0), expected)


def test_text_embeddings(refiner: Served) -> None:
    embeds = refiner.client.encode_prompt("sdxl_refiner", START["prompt"], negative_prompt="")
    arguments = {name: value for name, value in START.items() if name != "prompt"}
    expected = refiner.generate(**START, negative_prompt="", seed=0)
    assert_same(
        refiner.generate(**arguments, **embeds, seed=0), np.stack([np.asarray(image) for image in expected.images])
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "image: sdxl_refiner only changes pictures: it needs an image to start from"),
        ({"image": SCENE, "prompt_2": "a dog"}, "prompt_2"),
        ({"image": SCENE, "target_size": (64, 64)}, "target_size"),
        ({"image": SCENE, "aesthetic_score": 11}, "aesthetic_score: must be 0 to 10, got 11"),
    ],
)
def test_refusals(refiner: Served, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        refiner.generate(**PROMPT, **arguments)


def test_only_refiners_take_scores(served: Callable[[str], Served]) -> None:
    with pytest.raises(InvalidRequest, match="aesthetic_score"):
        served("sdxl").generate(**START, aesthetic_score=6.0)
