"""Request parsing, without a server: invalid requests are refused before any work, and errors name the parameter."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from imprompt_bench import rig
from imprompt_serving.errors import InvalidRequest
from imprompt_serving.job_request import batch_key
from imprompt_serving.pipeline import images
from imprompt_serving.pipeline.request import Request, parse
from imprompt_serving.specs import (
    Bundle,
    ControlNet,
    CrossAttention,
    Limits,
    Motion,
    Range,
    Residual,
    Shapes,
    T2IAdapter,
)
from imprompt_serving.wire import request_tensors

LIMITS = Limits(
    prompt_characters=100,
    json_characters=2000,
    images=6,
    image_megapixels=0.25,
    image_aspect_ratio=8.0,
    sample_steps=200,
    train_timesteps=2000,
    timeout_seconds=60.0,
)
BUNDLE = msgspec.structs.replace(
    rig.sd15(rows=2, adapters=("plain", "other")),
    shapes=Shapes(height=Range(64, 64, 128), width=Range(64, 64, 128), image_tokens=(4, 16), regions=2),
    layers=tuple(
        CrossAttention(name=f"{block}.attentions.0.transformer_blocks.0.attn2.processor", level=level)
        for block, level in (("down_blocks.0", 0), ("down_blocks.1", 1), ("up_blocks.1", 1), ("mid_block", 2))
    ),
    default_height=64,
    default_width=64,
    limits=LIMITS,
    controlnets=(ControlNet(name="depth"),),
    residuals=(Residual(4, 0),),
    t2i_adapters=(T2IAdapter(name="sketch", channels=1, downscale_factor=16),),
    features=(Residual(4, 0),),
    motion=Motion(window=16),
)
NUMPY = {"FP64": np.float64, "FP32": np.float32, "INT32": np.int32, "INT64": np.int64, "BOOL": np.bool_}


def tensors(bundle: Bundle, values: dict[str, Any]) -> dict[str, np.ndarray]:
    """Turn values into tensors as Triton passes them: arrays unchanged, others by the table of parameters."""
    types = {tensor.name: tensor.dtype for tensor in request_tensors(bundle, stream=True)}

    def tensor(name: str, value: Any) -> np.ndarray:
        if isinstance(value, np.ndarray):
            return value
        items = value if isinstance(value, list) else [value]
        if types.get(name, "STRING") != "STRING":
            return np.array(items, NUMPY[types[name]])
        return np.array([item.encode() if isinstance(item, str) else item for item in items], object)

    return {name: tensor(name, value) for name, value in values.items()}


def parsed(bundle: Bundle = BUNDLE, **values: Any) -> Request:
    return parse(tensors(bundle, {"prompt": "a cat", "num_inference_steps": 4, **values}), bundle)


def refused(bundle: Bundle = BUNDLE, **values: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parsed(bundle, **values)
    assert str(caught.value).startswith(f"{caught.value.parameter}: ")
    assert len(str(caught.value).encode()) <= 1024
    return caught.value


def picture(width: int = 64, height: int = 64, mode: str = "RGB", kind: str = "PNG", color: str | None = None) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height), color or (128 if mode != "RGB" else (200, 100, 50))).save(file, kind)
    return file.getvalue()


SMALL = picture()
BLACK = picture(color="black")
PROMPTED = {"ip_adapter_image": SMALL, "ip_adapter_image_adapter": "plain"}
NESTED = "[" * 900 + "]" * 900


@pytest.mark.parametrize(
    ("parameter", "values"),
    [
        ("nonsense", {"nonsense": 1}),
        ("prompt_2", {"prompt_2": "SDXL only"}),
        ("prompt", {"prompt": np.array([], object)}),
        ("prompt", {"prompt": np.array([1, 2])}),
        ("prompt", {"prompt": b"\xff\xfe"}),
        ("prompt", {"prompt": "x" * 101}),
        ("negative_prompt", {"prompt": "x" * 60, "negative_prompt": "x" * 60}),
        ("num_images_per_prompt", {"num_images_per_prompt": 65}),
        ("num_images_per_prompt", {"num_images_per_prompt": 1.5 * np.ones(1)}),
        ("height", {"height": np.array([], np.int32)}),
        ("height", {"height": [64, 64]}),
        ("height", {"height": 100}),
        ("width", {"width": 4096}),
        ("guidance_scale", {"guidance_scale": 1e30}),
        ("guidance_scale", {"guidance_scale": float("nan")}),
        ("guidance_scale", {"guidance_scale": np.array([1 + 1j])}),
        ("seed", {"seed": [1, 2]}),
        ("seed", {"seed": np.zeros(100_000, np.int64)}),
        ("seed", {"seed": np.array([b"1"], object)}),
        ("preview", {"preview": np.array([1], np.int64)}),
        ("output_type", {"output_type": "pdf" * 1000}),
        ("output_format", {"output_format": "gif"}),
        ("output_format", {"output_format": "png", "output_type": "latent"}),
        ("timeout", {"timeout": -1.0}),
        ("timeout", {"timeout": float("inf")}),
        ("num_inference_steps", {"num_inference_steps": 101, "num_images_per_prompt": 2}),
        ("num_inference_steps", {"num_inference_steps": 30, "num_frames": 8}),
        ("scheduler", {"scheduler": "MagicScheduler" * 1000}),
        ("encode_image", {"encode_image": "no such adapter"}),
        ("ip_adapter_image", {"encode_image": "plain"}),
        ("ip_adapter_image", {"encode_image": "other", **PROMPTED}),
        ("ip_adapter_scale", {**PROMPTED, "ip_adapter_scale": 1e5}),
        ("ip_adapter_image", {"ip_adapter_image": SMALL, "ip_adapter_image_adapter": "\x00"}),
        ("ip_adapter_image_embeds", {"ip_adapter_image_embeds_plain": np.full((2, 1, 1024), 1e38, np.float32)}),
        ("ip_adapter_image_embeds", {"ip_adapter_image_embeds_plain": np.full((2, 1, 1024), np.nan, np.float32)}),
        ("ip_adapter_image_embeds", {"ip_adapter_image_embeds_plain": np.zeros((2, 0, 1024), np.float32)}),
        ("ip_adapter_image_embeds", {"ip_adapter_image_embeds_plain": np.zeros((1, 1, 1024), np.float32)}),
        ("ip_adapter_image_embeds_plain", {"ip_adapter_image_embeds_plain": np.array([b"x"], object)}),
        ("mask_image", {"mask_image": SMALL}),
        ("mask_image", {"image": [SMALL] * 2, "mask_image": [SMALL] * 3, "num_images_per_prompt": 6}),
        ("mask_image", {"num_frames": 8, "mask_image": SMALL}),
        ("mask_image", {"image": SMALL, "mask_image": picture(32, 64), "padding_mask_crop": 4}),
        ("mask_image", {"image": SMALL, "mask_image": BLACK, "padding_mask_crop": 4}),
        (
            "padding_mask_crop",
            {"image": [SMALL] * 2, "mask_image": SMALL, "padding_mask_crop": 4, "num_images_per_prompt": 2},
        ),
        ("padding_mask_crop", {"image": SMALL, "padding_mask_crop": 4}),
        ("strength", {"strength": 0.5}),
        ("strength", {"image": SMALL, "strength": 0.1}),
        ("controlnet", {"control_image": SMALL, "controlnet": "no such net" * 1000}),
        (
            "controlnet_conditioning_scale",
            {"control_image": SMALL, "controlnet": "depth", "controlnet_conditioning_scale": 1e9},
        ),
    ],
    ids=str,
)
def test_refusals_name_the_parameter(parameter: str, values: dict[str, Any]) -> None:
    assert refused(**values).parameter == parameter


@pytest.mark.parametrize(
    "text",
    [
        "abc",
        '"abc"',
        "null",
        "true",
        '[[["linear"]]]',
        NESTED,
        "9" * 5000,
        "9" * 400,
        '"\\ud83d"',
        "NaN",
        "1e999",
        '{"up": {"block_0": [true]}}',
        '{"up": null}',
        "[" * 99,
    ],
)
def test_invalid_json_scales_are_refused(text: str) -> None:
    bundle = msgspec.structs.replace(BUNDLE, limits=Limits())
    assert refused(bundle, **PROMPTED, ip_adapter_scale_config=text).parameter == "ip_adapter_scale_config"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"up": {"block_9": 1.0}}', "no up.block_9"),
        ('{"sideways": 1.0}', "no sideways"),
        ('{"up": {"block_1": [1, 2]}}', "up.block_1 takes 3 numbers (one per layer), or one for all; got 2"),
        ('{"down": [1, 2, 3]}', "down.block_0 takes 2 numbers (one per layer), or one for all; got 3"),
        ('{"mid": [1, 2]}', "mid takes one number; got 2"),
        ('{"mid": {"block_0": 1.0}}', "mid has no block_0"),
        ("[[0.1, 0.2]]", "a list needs masks"),
        ('{"up": {"block_1": [[0.1, 0.2]]}}', "a list needs masks"),
    ],
)
def test_scales_that_do_not_fit_the_unet_are_refused(text: str, message: str) -> None:
    error = refused(**PROMPTED, ip_adapter_scale_config=text)
    assert error.parameter == "ip_adapter_scale"
    assert message in str(error)


@pytest.mark.parametrize(
    "config",
    [
        '"abc"', "null", "[1]", NESTED, "NaN", '{"beta_start": NaN}', '{"a": "\\ud83d"}',
        {"num_train_timesteps": 30_000_000}, {"num_train_timesteps": 3e7}, {"num_train_timesteps": -30_000_000},
        {"original_inference_steps": 30_000_000}, {"steps_offset": 2**63}, {"solver_order": 0}, {"solver_order": 1000},
        {"trained_betas": [0.1] * 2001}, {"trained_betas": [[0.1], [0.2]]}, {"trained_betas": [30_000_000]},
        {"solver_p": {"a": 1}}, {"noise_sampler_seed": 1.5}, {"noise_sampler_seed": "abc"},
        {"_class_name": "EDMEulerScheduler"}, {"_class_name": 5},
        {"_class_name": "DDIMScheduler", "_use_default_values": "beta_start"},
    ],
    ids=lambda config: str(config)[:60],
)  # fmt: skip
def test_scheduler_configurations_are_bounded(config: Any) -> None:
    text = config if isinstance(config, str) else json.dumps(config)
    bundle = msgspec.structs.replace(BUNDLE, limits=msgspec.structs.replace(LIMITS, json_characters=100_000))
    assert refused(bundle, scheduler_config=text).parameter == "scheduler_config"


EULER, DDPM = {"scheduler": "EulerDiscreteScheduler"}, {"scheduler": "DDPMScheduler"}
CLIP = {"num_frames": 8}
LATENT_ONES = np.ones((1, 4, 8, 8), np.float32)
WITH_LORAS = msgspec.structs.replace(BUNDLE, loras=("soft", "bold"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"soft"', "must be a JSON object of scales by name, got 'soft'"),
        ('{"loud": 1}', "'loud' is not one of soft, bold"),
        ('{"soft": true}', "the scale of soft must be a number, got True"),
        ('{"soft": [1]}', "the scale of soft must be a number"),
        ('{"soft": NaN}', "the scale of soft must be -10 to 10, got nan"),
        ('{"soft": Infinity}', "the scale of soft must be -10 to 10, got inf"),
        ('{"soft": 0.5, "bold": -10.5}', "the scale of bold must be -10 to 10, got -10.5"),
        (f'{{"soft": {10**18}}}', "the scale of soft must be -10 to 10"),
    ],
)
def test_invalid_loras_are_refused(text: str, message: str) -> None:
    error = refused(WITH_LORAS, lora=text)
    assert error.parameter == "lora"
    assert message in str(error)


def test_loras_are_refused_if_the_bundle_has_none() -> None:
    error = refused(lora="{}")
    assert error.parameter == "lora"
    assert "is not a parameter of" in str(error)


def test_equal_sets_of_loras_compare_equal() -> None:
    """They are sorted as in the bundle, without scales of zero, so that their jobs share calls."""
    sets = [
        parsed(WITH_LORAS, lora=json.dumps(lora)).settings
        for lora in ({"bold": 1, "soft": 0.5}, {"soft": 0.5, "bold": 1.0}, {"soft": 0.0}, {})
    ]
    assert list(sets[0].lora.items()) == list(sets[1].lora.items()) == [("soft", 0.5), ("bold", 1.0)]
    assert sets[2].lora == sets[3].lora == {}
    keys = [batch_key(WITH_LORAS, settings, None, None, regions=False, text_tokens=77) for settings in sets]
    assert keys[0] == keys[1] != keys[2] == keys[3]


def test_json_is_bounded() -> None:
    assert "at most 2000" in str(refused(scheduler_config=json.dumps({"beta_start": [0.0] * 1000})))


def test_valid_scheduler_configurations_are_accepted() -> None:
    config = {"lambda_min_clipped": float("-inf"), "trained_betas": None, "noise_sampler_seed": 2**64 - 1}
    request = parsed(scheduler_config=json.dumps(config))
    assert request.settings.scheduler_config == config | {"lambda_min_clipped": "-inf"}
    saved = {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": "0.42",
        "_use_default_values": ["eta"],
        "beta_end": 0.1,
    }
    request = parsed(scheduler_config=json.dumps(saved))
    assert request.settings.scheduler == "DDIMScheduler"
    assert request.settings.scheduler_config == {"_use_default_values": ["eta"], "beta_end": 0.1}
    assert parsed(scheduler="LCMScheduler", scheduler_config=json.dumps(saved)).settings.scheduler == "LCMScheduler"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ip_adapter_image": [b"x"] * 7}, "ip_adapter_image: a request takes at most 6 pictures in total"),
        ({"ip_adapter_image": [b"x"] * 4, "image": [b"x"] * 3}, "image: a request takes at most 6 pictures in total"),
        (
            {"ip_adapter_image": [SMALL] * 5, "ip_adapter_image_adapter": ["plain"] * 5},
            "5 pictures for plain make 20 image tokens; at most 16",
        ),
        (
            {
                "ip_adapter_image": [SMALL] * 3,
                "ip_adapter_image_adapter": ["plain"] * 3,
                "ip_adapter_masks": [SMALL] * 3,
                "ip_adapter_masks_adapter": ["plain"] * 3,
            },
            "3 masks; at most 2",
        ),
        ({"image": [SMALL] * 2}, "2 pictures cannot be divided among 1 results"),
        ({"image": [picture(400, 400)] * 2, "num_images_per_prompt": 2}, "image: picture 2 of 2: 400x400 is too large"),
        ({"image": picture(400, 400), "mask_image": picture(400, 400)}, "mask_image: 400x400 is too large"),
        ({"image": picture(90, 10)}, "image: 90x10 is too elongated; the longer side may be at most 8 times"),
        ({"image": SMALL, "height": 100}, "height: must be a multiple of 8"),
        ({"image": SMALL, "scheduler": "none"}, "scheduler: 'none' is not one of DDIMScheduler"),
    ],
)
def test_refused_requests_decode_no_pictures(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(images, "decode", lambda *_: pytest.fail("decoded"))
    assert message in str(refused(**values))


def test_limit_of_image_tokens_also_applies_to_embeddings() -> None:
    embeds = np.zeros((2, 5, 1024), np.float32)
    assert "5 pictures for plain make 20 image tokens" in str(refused(ip_adapter_image_embeds_plain=embeds))
    many = {"ip_adapter_image": [SMALL] * 5, "ip_adapter_image_adapter": ["plain"] * 5}
    assert len(parsed(**many, encode_image="plain").image_prompts[0].images) == 5  # which never reach the UNet


def test_engines_built_for_ranges_refuse_many_pictures_next_to_masks() -> None:
    given = {
        "ip_adapter_image": [SMALL] * 4,
        "ip_adapter_image_adapter": ["plain"] * 2 + ["other"] * 2,
        "ip_adapter_masks": [SMALL] * 2,
        "ip_adapter_masks_adapter": ["plain"] * 2,
    }
    assert len(parsed(**given).image_prompts) == 2
    for_ranges = msgspec.structs.replace(BUNDLE, backend="tensorrt")
    assert "at most 4 are supported next to several masks" in str(refused(for_ranges, **given))


@pytest.mark.parametrize(("given", "kept"), [(None, 60.0), (5.0, 5.0), (1e9, 60.0)])
def test_requests_can_only_shorten_the_timeout(given: float | None, kept: float) -> None:
    assert parsed(**({} if given is None else {"timeout": given})).timeout == kept


@pytest.mark.parametrize(
    ("parameter", "most", "beyond"),
    [
        ("num_inference_steps", {"num_images_per_prompt": 50}, {"num_images_per_prompt": 51}),  # of 4 steps each
        (
            "num_inference_steps",
            {"num_inference_steps": 25, "num_frames": 8},
            {"num_inference_steps": 26, "num_frames": 8},
        ),
        ("height", {"height": 64, "width": 128}, {"height": 56}),
        ("width", {"height": 128, "width": 64}, {"width": 136}),
        ("image", {"image": picture(128, 64)}, {"image": picture(136, 64)}),
        ("strength", {"image": SMALL, "strength": 0.25}, {"image": SMALL, "strength": 0.24}),
        ("strength", {"image": SMALL, "strength": 1.0}, {"image": SMALL, "strength": 0.0}),
        ("sigmas", {"sigmas": [3.0, 0.0], **EULER}, {"sigmas": [3.0, 3.0], **EULER}),
        (
            "timesteps",
            {"timesteps": [1, 0], "scheduler": "DDPMScheduler"},
            {"timesteps": [1, 1], "scheduler": "DDPMScheduler"},
        ),
        ("seed", {"seed": [1, 2], "num_images_per_prompt": 2}, {"seed": [1, 2, 3], "num_images_per_prompt": 2}),
        (
            "latents",
            {"latents": np.full((1, 4, 8, 8), 1e4, np.float32)},
            {"latents": np.full((1, 4, 8, 8), 1.1e4, np.float32)},
        ),
        (
            "image",
            {"image": picture(160, 20), "height": 64, "width": 64},
            {"image": picture(161, 20), "height": 64, "width": 64},
        ),
    ],
    ids=str,
)
def test_limits_are_included(parameter: str, most: dict[str, Any], beyond: dict[str, Any]) -> None:
    assert parsed(**most)
    assert refused(**beyond).parameter == parameter


def test_random_seeds_are_below_2_to_the_32() -> None:
    seeds = parsed(num_images_per_prompt=50).seeds
    assert len(set(seeds)) == 50
    assert max(seeds) < 2**32


@pytest.mark.parametrize(
    ("factor", "values", "size"),
    [
        (8, {"image": picture(101, 75)}, (72, 96)),
        (4, {"image": picture(101, 75)}, (72, 100)),
        (16, {"image": picture(101, 75)}, (64, 96)),
        (8, {"control_image": picture(104, 72), "controlnet": "depth"}, (72, 104)),
        (8, {"control_image": picture(104, 72), "controlnet": "sketch"}, (64, 96)),
        (8, {"control_image": [picture(104, 72)] * 2}, (64, 96)),
        (8, {"control_image": picture(104, 72), "controlnet": "sketch", "height": 80}, (80, 96)),
        (8, {"image": picture(101, 75), "width": 64}, (72, 64)),
        (8, {"image": SMALL, "mask_image": picture(101, 75)}, (64, 64)),
    ],
)
def test_default_size_comes_from_the_picture(factor: int, values: dict[str, Any], size: tuple[int, int]) -> None:
    """Sizes are rounded down to the required multiple (`VaeImageProcessor.get_default_height_width`)."""
    request = parsed(msgspec.structs.replace(BUNDLE, vae_scale_factor=factor), **values)
    assert (request.settings.height, request.settings.width) == size


@pytest.mark.parametrize("name", ["image", "control_image"])
def test_pictures_outside_the_range_of_sizes_are_refused(name: str) -> None:
    error = refused(**{name: picture(300, 300)}, **({"controlnet": "depth"} if name == "control_image" else {}))
    assert error.parameter == name
    assert "a picture of 300x300 gives height 296, but it must be 64 to 128" in str(error)
    assert "set height and width, or resize the picture" in str(error)


def test_sizes_without_engines_are_refused() -> None:
    """AOTInductor on a GPU builds engines for single sizes: only these are accepted, however the sides are given."""
    bundle = msgspec.structs.replace(BUNDLE, sizes=((64, 64), (64, 128)))
    assert parsed(bundle, width=128).settings.width == 128
    for values in ({"height": 128}, {"height": 128, "width": 128}, {"image": picture(101, 75)}):
        with pytest.raises(InvalidRequest, match=r"height: with width: must be 64x64, 64x128 \(height x width\), got "):
            parsed(bundle, **values)


@pytest.mark.parametrize(("images", "masks"), [(1, 1), (1, 2), (2, 1), (2, 2), (2, 4), (4, 2)])
def test_counts_of_pictures_and_masks(images: int, masks: int) -> None:
    values = {"image": [SMALL] * images, "mask_image": [SMALL] * masks, "num_images_per_prompt": 4}
    if 1 in (images, masks) or images == masks:
        start = parsed(**values).start
        assert start is not None
        assert (len(start.images), len(start.masks), start.mask_crop) == (images, masks, None)
    else:
        assert refused(**values).parameter == "mask_image"


def test_a_mask_can_be_cropped_to() -> None:
    start = parsed(image=SMALL, mask_image=SMALL, padding_mask_crop=4).start
    assert start is not None
    assert start.mask_crop == 4


def floats(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("parameter", "values"),
    [
        ("prompt", {"prompt": None}),
        ("prompt", {"prompt_embeds": floats(1, 77, 768)}),
        ("prompt_embeds", {"prompt": None, "prompt_embeds": floats(1, 77, 767)}),
        ("prompt_embeds", {"prompt": None, "prompt_embeds": floats(77, 768)}),
        ("prompt_embeds", {"prompt": None, "prompt_embeds": floats(1, 0, 768)}),
        ("prompt_embeds", {"prompt": None, "prompt_embeds": floats(0, 77, 768)}),
        ("prompt_embeds", {"prompt": None, "prompt_embeds": floats(1, 8 * 77 + 1, 768)}),
        ("prompt_embeds", {"prompt": None, "prompt_embeds": np.full((1, 77, 768), np.nan, np.float32)}),
        ("prompt_embeds", {"prompt": None, "prompt_embeds": np.full((1, 77, 768), 2e4, np.float32)}),
        ("prompt_embeds", {"prompt": None, "prompt_embeds": np.zeros((1, 77, 768), np.int32)}),
        ("num_images_per_prompt", {"prompt": None, "prompt_embeds": floats(65, 77, 768)}),
        ("negative_prompt", {"negative_prompt": "b", "negative_prompt_embeds": floats(1, 77, 768)}),
        ("negative_prompt_embeds", {"negative_prompt_embeds": floats(2, 77, 768)}),
        ("negative_prompt_embeds", {"negative_prompt_embeds": floats(1, 78, 768)}),
        ("negative_prompt_embeds", {"prompt": None, "prompt_embeds": floats(1, 78, 768)}),
        (
            "negative_prompt_embeds",
            {"prompt": None, "prompt_embeds": floats(1, 154, 768), "negative_prompt_embeds": floats(1, 77, 768)},
        ),
        ("encode_prompt", {"prompt": None, "prompt_embeds": floats(1, 77, 768), "encode_prompt": True}),
        ("latents", {"latents": floats(1, 4, 8, 9)}),
        ("latents", {"latents": floats(2, 4, 8, 8)}),
        ("latents", {"latents": np.full((1, 4, 8, 8), np.inf, np.float32)}),
        ("latents", {"latents": floats(1, 4, 8, 8), "image": SMALL}),
        ("latents", {"latents": floats(1, 4, 8, 8), "num_frames": 2}),
    ],
)
def test_invalid_tensors(parameter: str, values: dict[str, Any]) -> None:
    values = {"prompt": "a cat", **values}
    if values["prompt"] is None:
        del values["prompt"]
    with pytest.raises(InvalidRequest) as caught:
        parse(tensors(BUNDLE, {"num_inference_steps": 4, **values}), BUNDLE)
    assert caught.value.parameter == parameter


SDXL = msgspec.structs.replace(
    BUNDLE, family="sdxl", text_encoders=BUNDLE.text_encoders * 2, pooled_size=4, scheduler="EulerDiscreteScheduler"
)
POOLED = {"prompt": None, "prompt_embeds": floats(1, 77, 1536), "pooled_prompt_embeds": floats(1, 4)}
LATENTS = {"image_latents": floats(1, 4, 8, 8)}


@pytest.mark.parametrize(
    ("parameter", "values"),
    [
        ("pooled_prompt_embeds", {"prompt_embeds": floats(1, 77, 1536), "prompt": None}),
        ("prompt_embeds", {"pooled_prompt_embeds": floats(1, 4), "prompt": None}),
        ("prompt_2", {**POOLED, "prompt_2": "b"}),
        ("pooled_prompt_embeds", {**POOLED, "pooled_prompt_embeds": floats(1, 5)}),
        ("pooled_prompt_embeds", {**POOLED, "pooled_prompt_embeds": floats(2, 4)}),
        ("image_latents", {"image_latents": floats(1, 3, 8, 8)}),
        ("image_latents", {"image_latents": floats(2, 4, 8, 8)}),
        ("image_latents", {"image_latents": floats(1, 4, 4, 8)}),
        ("image_latents", {"image_latents": floats(1, 4, 8, 8) + np.float32(np.nan)}),
        ("image_latents", {**LATENTS, "image": SMALL}),
        ("image_latents", {**LATENTS, "mask_image": SMALL}),
        ("image_latents", {**LATENTS, "num_frames": 2}),
        ("height", {**LATENTS, "height": 128}),
        ("denoising_start", {"denoising_start": 0.5}),
        ("denoising_start", {**LATENTS, "denoising_start": 0.0}),
        ("denoising_start", {**LATENTS, "denoising_start": 0.5, "denoising_end": 0.5}),
        ("denoising_end", {"denoising_end": 1.0}),
        ("timesteps", {"timesteps": [5, 5]}),
        ("timesteps", {"timesteps": [5, 9]}),
        ("timesteps", {"timesteps": [-1]}),
        ("timesteps", {"timesteps": list(range(1001, 0, -1))}),
        ("timesteps", {"timesteps": [5], "scheduler": "DDIMScheduler"}),
        ("sigmas", {"sigmas": [5.0, np.inf]}),
        ("sigmas", {"sigmas": [1.0, 2.0]}),
        ("sigmas", {"timesteps": [5], "sigmas": [1.0]}),
        ("num_inference_steps", {"timesteps": list(range(300, 0, -1))}),
        ("prompt", {"prompt": "(a:1.2.3)", "prompt_syntax": "a1111"}),
        ("negative_prompt_2", {"negative_prompt": "a", "negative_prompt_2": "(" * 70, "prompt_syntax": "a1111"}),
        ("max_embeddings_multiples", {"max_embeddings_multiples": 0}),
    ],
)  # fmt: skip
def test_invalid_texts_and_steps(parameter: str, values: dict[str, Any]) -> None:
    values = {"prompt": "a cat", "num_inference_steps": 4, **values}
    if values["prompt"] is None:
        del values["prompt"]
    with pytest.raises(InvalidRequest) as caught:
        parse(tensors(SDXL, values), SDXL)
    assert caught.value.parameter == parameter


def test_custom_steps_replace_their_number() -> None:
    request = parse(tensors(SDXL, {"prompt": "a", "timesteps": [900, 500, 1], "num_inference_steps": 50}), SDXL)
    assert request.settings.steps == 3
    assert parse(tensors(SDXL, {"prompt": "a", **LATENTS, "denoising_start": 0.5}), SDXL).task == "image-to-image"


def test_embeddings_without_guidance_need_no_negative_ones() -> None:
    values = {"prompt_embeds": floats(2, 78, 768), "guidance_scale": 1.0, "num_inference_steps": 4}
    request = parse(tensors(BUNDLE, values), BUNDLE)
    assert (request.pictures, request.text.tokens) == (2, 78)


def test_lengths_that_differ_by_a_power_of_two_share_calls() -> None:
    settings = parsed().settings
    lengths = (77, 154, 308, 616, 231, 462, 64, 1)
    keys = [batch_key(BUNDLE, settings, None, None, regions=False, text_tokens=tokens) for tokens in lengths]
    assert [keys.index(key) for key in keys] == [0, 0, 0, 0, 4, 4, 6, 6]


def test_unusual_prompts_are_accepted() -> None:
    assert parsed(prompt=["", "\x00", "👩🏽‍🎨"]).text.prompts == (("", "\x00", "👩🏽‍🎨"),)


def test_pipeline_imports_no_torch() -> None:
    code = "import sys, imprompt_serving.pipeline.flow; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_defaults_of_the_bundle_come_before_those_of_diffusers() -> None:
    bundle = msgspec.structs.replace(BUNDLE, defaults={"num_inference_steps": 4, "guidance_scale": 0.0})
    settings = parse(tensors(bundle, {"prompt": "a cat"}), bundle).settings
    assert (settings.num_inference_steps, settings.guidance_scale, settings.guidance_rescale) == (4, 0.0, 0.0)
    asked = {"prompt": "a cat", "num_inference_steps": 6, "guidance_scale": 2.0}
    settings = parse(tensors(bundle, asked), bundle).settings
    assert (settings.num_inference_steps, settings.guidance_scale) == (6, 2.0)


def test_an_adapter_without_its_encoder_refuses_pictures() -> None:
    adapters = tuple(msgspec.structs.replace(adapter, image_encoder=None) for adapter in BUNDLE.adapters)
    bundle = msgspec.structs.replace(BUNDLE, adapters=adapters)
    values = {"prompt": "a cat", "ip_adapter_image": picture(), "ip_adapter_image_adapter": "plain"}
    with pytest.raises(InvalidRequest, match="ip_adapter_image: plain only takes embeddings") as caught:
        parse(tensors(bundle, values), bundle)
    assert caught.value.parameter == "ip_adapter_image"


@pytest.mark.parametrize("task", ["inpainting", "image-to-image"])
def test_models_that_only_change_pictures_encode_prompts_without_one(task: str) -> None:
    changes = {"inpainting": {"unet_channels": 9}, "image-to-image": {"family": "sdxl_refiner", "pooled_size": 8}}
    bundle = msgspec.structs.replace(BUNDLE, adapters=(), t2i_adapters=(), **changes[task])
    assert bundle.plain_task == task
    assert refused(bundle).parameter == {"inpainting": "mask_image", "image-to-image": "image"}[task]
    assert parsed(bundle, encode_prompt=True).encode_prompt


@pytest.mark.parametrize("masks", [0, 1, 2])
def test_regions_are_several_masked_pictures_of_an_adapter(masks: int) -> None:
    count = max(masks, 1)
    values: dict[str, Any] = {"ip_adapter_image": [SMALL] * count, "ip_adapter_image_adapter": ["plain"] * count}
    if masks:
        values |= {"ip_adapter_masks": [SMALL] * masks, "ip_adapter_masks_adapter": ["plain"] * masks}
    assert parsed(**values).regions is (masks > 1)
