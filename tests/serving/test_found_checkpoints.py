"""Compare pictures of checkpoints as people find them with those of diffusers, through a running Triton.

The bundle `sd2` is an SD 2.1 base in a single file with another VAE, a textual inversion embedding, a LoRA, an adapter
without its image encoder, and defaults of its own; `sdxl_control` is a base in half precision with an embedding for
both text encoders.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file

from bundles import ZERO_SNR
from imprompt import InvalidRequest
from parity import assert_different, assert_same
from served import Served
from tiny import images, oracle
from tiny.weights import generator, normal

TOY: dict[str, Any] = {"prompt": "a photo of <toy> in the rain", "negative_prompt": "dark"}
DEFAULTS: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0, "guidance_rescale": 0.7}
EMBEDS = normal(generator(0), 2, 1, 257, 80)
"""Negative and positive hidden states of one picture."""


@pytest.fixture
def sd2(served: Callable[[str], Served]) -> Served:
    return served("sd2")


def load(sd2: Served, *, vae: bool = True, lora: bool = True) -> Any:
    folder = sd2.bundle.checkpoints
    config = {"config": str(folder / "base")}
    own = AutoencoderKL.from_single_file(str(folder / "vae.ckpt"), subfolder="vae", **config) if vae else None
    pipe = StableDiffusionPipeline.from_single_file(
        str(folder / "base/sd2.safetensors"), **config, **({"vae": own} if vae else {})
    )
    pipe.load_textual_inversion(str(folder), weight_name="embedding.pt")
    (adapter,) = sd2.bundle.adapters
    name, subfolder = adapter.weight_name, adapter.subfolder
    pipe.load_ip_adapter(str(adapter.path), subfolder=subfolder, weight_name=name, image_encoder_folder=None)
    if lora:
        pipe.load_lora_weights(folder / "lora", adapter_name="x")
        pipe.set_adapters(["x"], [0.7])
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **ZERO_SNR)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def expected(pipe: Any, *, scale: float = 0.0, **arguments: Any) -> np.ndarray:
    pipe.set_ip_adapter_scale(scale)
    return oracle.generate(pipe, ip_adapter_image_embeds=[EMBEDS], **TOY | DEFAULTS | arguments)


@pytest.fixture(scope="module")
def pipe(served: Callable[[str], Served]) -> Any:
    return load(served("sd2"))


@pytest.fixture(scope="module")
def picture(served: Callable[[str], Served]) -> Any:
    """The picture of a request without numbers of steps, guidance, and so on."""
    return served("sd2").generate(**TOY, seed=0)


def test_every_part_of_the_bundle_is_that_of_diffusers(sd2: Served, pipe: Any, picture: Any) -> None:
    assert_same(picture, expected(pipe))
    assert_different(picture, sd2.generate(**TOY | {"prompt": "a photo of a toy in the rain"}, seed=0))


@pytest.mark.parametrize("part", ["vae", "lora"])
def test_every_part_matters(sd2: Served, picture: Any, part: str) -> None:
    assert_different(picture, expected(load(sd2, **{part: False})))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_inference_steps": 6},
        {"guidance_scale": 1.0},
        {"guidance_scale": 7.0, "guidance_rescale": 0.0},
        {"prompt": "<toy>, <toy>_1, a cat"},
    ],
)
def test_requests_can_change_the_defaults(sd2: Served, pipe: Any, picture: Any, changes: dict[str, Any]) -> None:
    result = sd2.generate(**TOY | changes, seed=0)
    assert_same(result, expected(pipe, **changes))
    assert_different(result, picture)


@pytest.mark.parametrize(
    ("scheduler", "config"),
    [
        (None, {"rescale_betas_zero_snr": False, "timestep_spacing": "leading"}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {"prediction_type": "epsilon"}),
    ],
)
def test_other_schedulers_start_from_that_of_the_bundle(
    sd2: Served, pipe: Any, picture: Any, scheduler: str | None, config: dict[str, Any]
) -> None:
    """They predict v, unless the request says otherwise."""
    own = pipe.scheduler
    kind = type(own) if scheduler is None else getattr(diffusers, scheduler)
    pipe.scheduler = kind.from_config(own.config, **config)
    try:
        wanted = expected(pipe)
    finally:
        pipe.scheduler = own
    result = sd2.generate(**TOY, seed=0, **({"scheduler": scheduler} if scheduler else {}), scheduler_config=config)
    assert_same(result, wanted)
    assert_different(result, picture)


def test_an_adapter_without_its_encoder_takes_embeddings(sd2: Served, pipe: Any, picture: Any) -> None:
    arguments: dict[str, Any] = {**TOY, "seed": 0, "ip_adapter_scale": 0.6}
    result = sd2.generate(**arguments, ip_adapter_image_embeds=EMBEDS.numpy())
    assert_same(result, expected(pipe, scale=0.6))
    assert_different(result, picture)
    with pytest.raises(InvalidRequest, match="ip_adapter_image: plus only takes embeddings") as caught:
        sd2.generate(**arguments, ip_adapter_image=images.photo(1))
    assert caught.value.parameter == "ip_adapter_image"


def test_capabilities_name_the_defaults(sd2: Served) -> None:
    described = sd2.client.describe("sd2")
    assert described["defaults"] == {"height": 64, "width": 64, "scheduler": "DDIMScheduler", **DEFAULTS}
    assert [adapter["takes_images"] for adapter in described["ip_adapters"]] == [False]


def test_a_word_for_both_text_encoders_of_a_base_in_half_precision(served: Callable[[str], Served]) -> None:
    sdxl = served("sdxl_control")
    pipe = sdxl.bundle.oracle(StableDiffusionXLPipeline)
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.float32}
    content = load_file(sdxl.bundle.checkpoints / "learned_embeds.safetensors")
    for key, number in (("clip_l", ""), ("clip_g", "_2")):
        model, tokenizer = getattr(pipe, f"text_encoder{number}"), getattr(pipe, f"tokenizer{number}")
        pipe.load_textual_inversion(content[key], token="<toy>", text_encoder=model, tokenizer=tokenizer)
    arguments = {**TOY, "num_inference_steps": 4, "height": 64, "width": 64}
    result = sdxl.generate(**arguments, seed=0)
    assert_same(result, oracle.generate(pipe, **arguments))
    assert_different(result, sdxl.generate(**arguments | {"prompt": "a photo of a toy in the rain"}, seed=0))
