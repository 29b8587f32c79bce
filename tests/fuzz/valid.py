"""Valid requests, which must succeed: every task of a bundle, as small as the bundle allows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy as np

from fuzz.pictures import photo
from fuzz.target import Target

Values = dict[str, Any]
"""Values by input name: a list (one axis) or an array."""

TIMEOUT_S = 20.0
"""Keeps expensive mutated requests short; requests that lose it must end as well."""


def small(target: Target, seed: int = 1) -> Values:
    """Build the smallest text-to-image request, on which all others are based."""
    return {
        "prompt": ["a red circle"],
        "num_inference_steps": [2],
        "height": [target.smallest("height")],
        "width": [target.smallest("width")],
        "seed": [seed],
        "timeout": [TIMEOUT_S],
    }


def _text(rng: Random, target: Target) -> Values:
    return {"negative_prompt": ["blue"], "guidance_scale": [rng.choice((0.0, 1.0, 3.0, 7.5))], "clip_skip": [0]}


def _several(rng: Random, target: Target) -> Values:
    return {"prompt": ["a", "b"], "num_images_per_prompt": [2], "seed": [1, 2, 3, 4], "output_format": ["png"]}


def _encoded(rng: Random, target: Target) -> Values:
    return {"output_format": [rng.choice(("png", "jpeg", "webp"))], "guidance_rescale": [0.5], "priority": [1]}


def _latents(rng: Random, target: Target) -> Values:
    return {"output_type": ["latent"], "eta": [0.5]}


def _scheduler(rng: Random, target: Target) -> Values:
    chosen = rng.choice(target.capabilities["schedulers"])
    # Four steps, because the second order of Heun and KDPM2 and the third order of DPM++ need several.
    return {
        "scheduler": [chosen],
        "scheduler_config": ["{}"],
        "num_inference_steps": [4],
        "seed": [rng.choice((0, -1, 7))],
    }


def _start_picture(rng: Random, target: Target) -> Values:
    return {"image": [_own_size(target)], "strength": [rng.choice((0.5, 1.0))]}


def _inpainting(rng: Random, target: Target) -> Values:
    crop = {"padding_mask_crop": [4]} if rng.random() < 0.5 else {}
    return {"image": [_own_size(target)], "mask_image": [_own_size(target, 1)], **crop}


def _image_prompts(rng: Random, target: Target) -> Values:
    adapter = rng.choice(_picture_adapters(target))
    return {
        "ip_adapter_image": [photo(), photo(72, 1)],
        "ip_adapter_image_adapter": [adapter, adapter],
        "ip_adapter_scale": [0.5],
        "ip_adapter_image_per": [rng.choice(("request", "prompt"))],
        "ip_adapter_weight_type": [rng.choice(("linear", "style", "ease in"))],
        "ip_adapter_end": [rng.choice((0.5, 1.0))],
    }


def _scales_by_block(rng: Random, target: Target) -> Values:
    adapter = rng.choice(_picture_adapters(target))
    scale = {"down": rng.choice((0.0, 1.0)), "up": {"block_1": 0.5}}
    scales = [scale if own["name"] == adapter else 0.0 for own in target.adapters]
    given = {"ip_adapter_image": [photo()], "ip_adapter_image_adapter": [adapter]}
    return {**given, "ip_adapter_scale_config": [json.dumps(scales)]}


def _regions(rng: Random, target: Target) -> Values:
    adapter = rng.choice(_picture_adapters(target))
    return {
        "ip_adapter_image": [photo(), photo(64, 1)],
        "ip_adapter_image_adapter": [adapter] * 2,
        "ip_adapter_masks": [photo(), photo(64, 2)],
        "ip_adapter_masks_adapter": [adapter] * 2,
    }


def _embeddings(rng: Random, target: Target) -> Values:
    adapter = rng.choice(target.adapters)
    zeros = np.zeros((2, 1, *adapter["image_embeds"]), np.float32)
    return {f"ip_adapter_image_embeds_{adapter['name']}": zeros}


def _encode_image(rng: Random, target: Target) -> Values:
    adapter = rng.choice(_picture_adapters(target))
    return {"encode_image": [adapter], "ip_adapter_image": [photo()], "ip_adapter_image_adapter": [adapter]}


def _control(rng: Random, target: Target) -> Values:
    net = rng.choice(target.capabilities["controlnets"])
    start = {"image": [_own_size(target)], "strength": [0.8]} if rng.random() < 0.3 else {}
    return {
        "controlnet": [net],
        "control_image": [_own_size(target)],
        "controlnet_conditioning_scale": [0.5],
        "guess_mode": [rng.random() < 0.3],
        **start,
    }


def _clip(rng: Random, target: Target) -> Values:
    return {"num_frames": [max(target.smallest("frames"), 2)], "output_format": ["gif"], "num_inference_steps": [1]}


def _clip_from_video(rng: Random, target: Target) -> Values:
    frames = max(target.smallest("frames"), 2)
    return {"video": [_own_size(target)] * frames, "strength": [0.5], "num_inference_steps": [2]}


_RequestKind = Callable[[Random, Target], Values]
_ALWAYS: tuple[_RequestKind, ...] = (_text, _several, _encoded, _latents, _scheduler, _start_picture, _inpainting)
_WITH_IMAGE_PROMPTS: tuple[_RequestKind, ...] = (_image_prompts, _scales_by_block, _regions, _encode_image)


def request_kinds(target: Target) -> Sequence[_RequestKind]:
    """List what `target` supports, as functions that return what to add to the smallest request."""
    return (
        *_ALWAYS,
        *(_WITH_IMAGE_PROMPTS if _picture_adapters(target) else ()),
        *((_embeddings,) if target.adapters else ()),
        *((_control,) if target.capabilities["controlnets"] else ()),
        *((_clip, _clip_from_video) if target.capabilities["video"] else ()),
    )


def valid(rng: Random, target: Target) -> Values:
    """Draw a valid request."""
    return small(target, rng.randrange(3)) | rng.choice(request_kinds(target))(rng, target)


def _picture_adapters(target: Target) -> list[str]:
    """Name the adapters that accept any picture; FaceID adapters need one with a face."""
    return [own["name"] for own in target.adapters if own["takes_images"] and not own["kind"].startswith("faceid")]


def _own_size(target: Target, seed: int = 0) -> bytes:
    """Encode a picture of the size of the smallest request."""
    return photo(max(target.smallest("height"), target.smallest("width")), seed)
