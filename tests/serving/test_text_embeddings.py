"""Text embeddings and initial latents in place of prompts and seeds: the same pictures as diffusers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    MotionAdapter,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from imprompt import InvalidRequest
from parity import assert_different, assert_same
from served import Served
from tiny import images, oracle

SMALL: dict[str, Any] = {"num_inference_steps": 4, "height": 64, "width": 64}
STATUE = images.photo(1)
NAMES = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


@pytest.fixture(scope="module")
def pipe(served: Any) -> Any:
    return oracle.pipeline(served("sd15").bundle.checkpoints / "base", (), StableDiffusionPipeline, "DDIMScheduler")


@pytest.fixture(scope="module")
def sdxl(served: Any) -> Served:
    return served("sdxl")


@pytest.fixture(scope="module")
def sdxl_pipe(sdxl: Served) -> Any:
    return oracle.pipeline(sdxl.bundle.checkpoints / "base", (), StableDiffusionXLPipeline)


def encoded(pipe: Any, prompt: Any, **arguments: Any) -> dict[str, torch.Tensor]:
    """Return what the pipeline's `encode_prompt` returns, by parameter."""
    given = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True, **arguments}
    with torch.no_grad():
        return dict(zip(NAMES, pipe.encode_prompt(prompt=prompt, **given), strict=False))


def without(embeds: dict[str, Any], word: str) -> dict[str, Any]:
    return {name: value for name, value in embeds.items() if word not in name}


def compare(served: Served, pipe: Any, **arguments: Any) -> Any:
    """Assert that server and pipeline make the same picture without a prompt, and return the server's."""
    arguments = {**SMALL, **arguments}
    expected = oracle.generate(pipe, **{"prompt": None, **arguments})
    scheduler = type(pipe.scheduler).__name__
    result = served.generate(**arguments, scheduler=scheduler, **({} if "seed" in arguments else {"seed": 0}))
    assert_same(result, expected)
    return result


def test_embeddings_of_two_prompts(sd15: Served, pipe: Any) -> None:
    embeds = encoded(pipe, ["a cat", "a big dog"], negative_prompt=["blue", "red"])
    result = compare(sd15, pipe, **embeds, num_images_per_prompt=2)
    prompts = {"prompt": ["a cat", "a big dog"], "negative_prompt": ["blue", "red"], "num_images_per_prompt": 2}
    assert_same(sd15.generate(**SMALL, **prompts, scheduler="DDIMScheduler", seed=0), as_pictures(result))
    stronger = {**embeds, "prompt_embeds": 1.2 * embeds["prompt_embeds"]}
    assert_different(result, compare(sd15, pipe, **stronger, num_images_per_prompt=2))


def test_embeddings_with_an_image_prompt(sd15: Served) -> None:
    pipe = oracle.pipeline(sd15.bundle.checkpoints / "base", sd15.bundle.adapters[:1])
    pipe.set_ip_adapter_scale(0.6)
    embeds = encoded(pipe, "a cat", negative_prompt="dark")
    expected = oracle.generate(pipe, prompt=None, **SMALL, **embeds, ip_adapter_image=STATUE)
    result = sd15.generate(**SMALL, **embeds, ip_adapter_image={"plain": STATUE}, ip_adapter_scale=0.6, seed=0)
    assert_same(result, expected)


@pytest.mark.parametrize("tokens", [1, 50, 154, 200])
def test_embeddings_may_have_any_number_of_tokens(sd15: Served, pipe: Any, tokens: int) -> None:
    embeds = encoded(pipe, ["a cat"] * 3, negative_prompt=["dark", "blurry", "low"])
    joined = {name: torch.cat([*value], dim=0)[None, :tokens] for name, value in embeds.items()}
    result = compare(sd15, pipe, **joined)
    shorter = {name: value[:, : tokens // 2] for name, value in joined.items()}
    if tokens > 1:
        assert_different(result, sd15.generate(**SMALL, **shorter, scheduler="DDIMScheduler", seed=0))


def test_embeddings_in_one_branch(sd15: Served, pipe: Any) -> None:
    embeds = encoded(pipe, "a cat", negative_prompt="dark")
    positive, negative = without(embeds, "negative"), {"negative_prompt_embeds": embeds["negative_prompt_embeds"]}
    both = compare(sd15, pipe, **positive, negative_prompt="dark")
    assert_same(compare(sd15, pipe, prompt="a cat", **negative), as_pictures(both))
    assert_different(both, compare(sd15, pipe, **positive))
    compare(sd15, pipe, **positive, guidance_scale=1.0)


def test_a_short_prompt_beside_long_negative_embeddings(sd15: Served, pipe: Any) -> None:
    """The prompt is followed by empty chunks."""
    long = encoded(pipe, ["a cat", ""], negative_prompt=["dark", "blurry"])
    joined = {name: torch.cat([*value], dim=0)[None] for name, value in long.items()}
    negative = {"negative_prompt_embeds": joined["negative_prompt_embeds"]}
    result = sd15.generate(**SMALL, prompt="a cat", **negative, scheduler="DDIMScheduler", seed=0)
    assert_same(result, oracle.generate(pipe, **SMALL, prompt=None, **joined))


@pytest.mark.parametrize("arguments", [{}, {"clip_skip": 2}])
def test_sdxl(sdxl: Served, sdxl_pipe: Any, arguments: dict[str, Any]) -> None:
    embeds = encoded(sdxl_pipe, "a cat", prompt_2="woodcut", negative_prompt="dark", **arguments)
    result = compare(sdxl, sdxl_pipe, **embeds)
    zeros = compare(sdxl, sdxl_pipe, **without(embeds, "negative"))
    assert_different(result, zeros)
    other = {**embeds, "pooled_prompt_embeds": -embeds["pooled_prompt_embeds"]}
    assert_different(result, compare(sdxl, sdxl_pipe, **other))


def test_encode_prompt(sd15: Served, sdxl: Served, pipe: Any, sdxl_pipe: Any) -> None:
    texts: dict[str, Any] = {"negative_prompt": ["dark", "low"]}
    cases: tuple[tuple[Served, Any, dict[str, Any]], ...] = (
        (sd15, pipe, texts),
        (sdxl, sdxl_pipe, {**texts, "prompt_2": ["woodcut", "oil"], "clip_skip": 1}),
        (sdxl, sdxl_pipe, {}),  # zeros
    )
    for served, oracle_pipe, arguments in cases:
        expected = encoded(oracle_pipe, ["a cat", "a dog"], **arguments)
        embeds = served.client.encode_prompt(served.bundle.name, ["a cat", "a dog"], **arguments)
        assert embeds.keys() == expected.keys()
        for name, value in expected.items():
            assert embeds[name].dtype == np.float32
            np.testing.assert_allclose(embeds[name], value.numpy(), atol=1e-4, rtol=1e-4)
    embeds = sd15.client.encode_prompt("sd15", "a cat", negative_prompt="dark")
    result = sd15.generate(**SMALL, **embeds, seed=0)
    assert_same(sd15.generate(**SMALL, prompt="a cat", negative_prompt="dark", seed=0), as_pictures(result))


def test_encode_prompt_warns_of_a_truncated_prompt(sd15: Served) -> None:
    with pytest.warns(UserWarning, match="prompt: truncated to 77 tokens; cut off: a a the end"):
        sd15.client.encode_prompt("sd15", "a " * 77 + "the end")


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerAncestralDiscreteScheduler"])
def test_latents(sd15: Served, scheduler: str) -> None:
    """Also for a scheduler that scales the noise and draws more of it at each step."""
    pipe = oracle.pipeline(sd15.bundle.checkpoints / "base", (), StableDiffusionPipeline, scheduler)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    result = compare(sd15, pipe, prompt="a cat", num_images_per_prompt=2, latents=noise)
    assert_different(result, compare(sd15, pipe, prompt="a cat", num_images_per_prompt=2))


def test_latents_for_inpainting(sd15: Served) -> None:
    pipe = oracle.pipeline(sd15.bundle.checkpoints / "base", (), StableDiffusionInpaintPipeline, "DDIMScheduler")
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    picture = {"prompt": "a cat", "image": images.photo(7, size=(64, 64)), "mask_image": images.mask("circle")}
    result = compare(sd15, pipe, **picture, latents=noise, strength=0.6, num_inference_steps=6)
    assert_different(result, compare(sd15, pipe, **picture, strength=0.6, num_inference_steps=6))


def test_latents_of_a_clip(served: Any) -> None:
    control = served("control")
    checkpoints = control.bundle.checkpoints
    motion = MotionAdapter.from_pretrained(checkpoints / "motion")
    pipe = oracle.pipeline(checkpoints / "base", (), AnimateDiffPipeline, "DDIMScheduler", motion_adapter=motion)
    noise = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    clip = {**SMALL, "prompt": "a cat", "num_frames": 3, "latents": noise}
    result = control.generate(**clip, scheduler="DDIMScheduler", seed=0)
    (expected,) = oracle.generate(pipe, **clip)
    largest, _ = oracle.picture_distance(result.frames[0], expected)
    assert largest <= 2


def test_texts_of_different_lengths_share_calls(sd15: Served, pipe: Any) -> None:
    """Requests with 1, 2, and 4 chunks, and with 50 tokens, run together; each picture is the one it is alone."""
    long = encoded(pipe, ["a cat", "a dog", "snow", "a hat"], negative_prompt=["dark", "blurry", "low", "bad"])
    parts = {count: {n: torch.cat([*v[:count]])[None] for n, v in long.items()} for count in (1, 2, 4)}
    parts[0] = {name: value[:, :50] for name, value in parts[1].items()}
    arguments = {**SMALL, "num_inference_steps": 8, "scheduler": "DDIMScheduler", "seed": 0}
    with ThreadPoolExecutor(len(parts)) as pool:
        waits = {count: pool.submit(sd15.generate, **arguments, **part) for count, part in parts.items()}
    for count, part in parts.items():
        expected = oracle.generate(pipe, prompt=None, **{**SMALL, "num_inference_steps": 8}, **part)
        assert_same(waits[count].result(), expected)


def test_a_request_without_prompt_or_embeddings_is_refused(sd15: Served) -> None:
    with pytest.raises(InvalidRequest, match=r"^prompt: is needed, or prompt_embeds in its place"):
        sd15.generate(**SMALL)


def as_pictures(result: Any) -> np.ndarray:
    return np.stack([np.asarray(image) for image in result.images])
