"""Tensors of a request -> a checked ``Request``; whatever is wrong is refused here, by the parameter's name."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from imprompt_serving.errors import InvalidRequest
from imprompt_serving.job import SizeConditions, Task
from imprompt_serving.pipeline import images
from imprompt_serving.pipeline.clips import Clip, parse_clip
from imprompt_serving.pipeline.controls import Control, parse_controls
from imprompt_serving.pipeline.encoded import CLIP_FORMATS, PICTURE_FORMATS
from imprompt_serving.pipeline.image_prompts import ImagePrompt, adapter_name, parse_image_prompts
from imprompt_serving.pipeline.reader import Reader, spread
from imprompt_serving.specs import Bundle

MAX_STEPS = 1000
MAX_PICTURES = 64
_OUTPUT_TYPES = ("np", "latent")


@dataclass(frozen=True, kw_only=True, slots=True)
class StartImages:
    """Pictures (or frames) to start from, and masks of what to repaint; a mask crop has a margin in pixels."""

    images: tuple[Image.Image, ...] = ()
    masks: tuple[Image.Image, ...] = ()
    mask_crop: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a caller wants, checked, with defaults filled in (those of diffusers' pipelines)."""

    task: Task
    prompts: tuple[tuple[str, ...], ...]
    """A prompt for each text encoder and result."""
    negative_prompts: tuple[tuple[str, ...], ...] | None
    """Likewise; None when none was given."""
    image_prompts: tuple[ImagePrompt, ...]
    start: StartImages
    clip: Clip | None
    controls: tuple[Control, ...]
    guess_mode: bool
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    guidance_rescale: float
    eta: float
    strength: float
    clip_skip: int
    num_images_per_prompt: int
    seeds: tuple[int, ...]
    scheduler: str | None
    scheduler_config: dict[str, Any]
    sizes: SizeConditions
    output_type: str
    output_format: str | None
    timeout: float | None
    encode_image: str | None
    priority: int
    progress_every: int
    preview: bool

    @property
    def pictures(self) -> int:
        """Results: pictures or clips."""
        return len(self.prompts[0]) * self.num_images_per_prompt

    @property
    def frames(self) -> int | None:
        """Frames of each clip; None for pictures."""
        return None if self.clip is None else self.clip.frames


def parse(tensors: Mapping[str, np.ndarray], bundle: Bundle) -> Request:
    """Check everything that can be checked before any engine runs.

    Raises:
        InvalidRequest: the first parameter that is wrong, and what is allowed.
    """
    read = Reader(tensors)
    prompts = _prompts(read, bundle)
    num_images = read.integer("num_images_per_prompt", 1, 1, MAX_PICTURES)
    pictures = len(prompts[0]) * num_images
    if pictures > MAX_PICTURES:
        raise InvalidRequest(
            "num_images_per_prompt", f"{pictures} pictures asked for; at most {MAX_PICTURES} a request"
        )
    clip = parse_clip(read, bundle, pictures)
    start = _start(read, bundle, pictures, clip)
    task: Task = "inpainting" if start.masks else "image-to-image" if start.images else "text-to-image"
    if bundle.unet_channels != bundle.latent_channels and task != "inpainting":
        raise InvalidRequest("mask_image", f"{bundle.name} is an inpainting model: it needs image and mask_image")
    frames = None if clip is None else clip.frames
    controls = parse_controls(read, bundle, task, len(prompts[0]), frames)
    height, width = _size(read, bundle, task, start, controls, clip)
    timeout = read.number("timeout", math.inf, 1e-3)
    seeds = read.integers("seed")
    if len(seeds) not in (0, 1, pictures):
        raise InvalidRequest("seed", f"one for all or one for each of {pictures} pictures, got {len(seeds)}")
    return Request(
        task=task,
        prompts=prompts,
        negative_prompts=_negative_prompts(read, bundle, len(prompts[0])),
        image_prompts=parse_image_prompts(read, bundle),
        start=start,
        clip=clip,
        controls=controls,
        guess_mode=read.flag("guess_mode"),
        height=height,
        width=width,
        num_inference_steps=read.integer("num_inference_steps", 50, 1, MAX_STEPS),
        guidance_scale=read.number("guidance_scale", _default_guidance(bundle, task, controls)),
        guidance_rescale=read.number("guidance_rescale", 0.0, 0.0, 1.0),
        eta=read.number("eta", 0.0, 0.0, 1.0),
        strength=_strength(read, bundle, task, controls),
        clip_skip=read.integer("clip_skip", 0, 0, bundle.max_clip_skip),
        num_images_per_prompt=num_images,
        seeds=seeds or tuple(secrets.randbelow(2**63) for _ in range(pictures)),
        scheduler=read.text("scheduler"),
        scheduler_config=read.json("scheduler_config", dict) or {},
        sizes=_size_conditions(read),
        output_type=read.choice("output_type", _OUTPUT_TYPES, "np"),
        output_format=_output_format(read, PICTURE_FORMATS if clip is None else CLIP_FORMATS),
        timeout=timeout if math.isfinite(timeout) else None,
        encode_image=adapter_name(read.text("encode_image"), bundle, "encode_image"),
        priority=read.integer("priority", 5, 1, 9),
        progress_every=read.integer("progress_every", 1, 1, MAX_STEPS),
        preview=read.flag("preview"),
    )


def _prompts(read: Reader, bundle: Bundle) -> tuple[tuple[str, ...], ...]:
    prompt = read.texts("prompt")
    if not prompt:
        raise InvalidRequest("prompt", "at least one prompt is needed")
    second = read.texts("prompt_2")
    if len(second) not in (0, len(prompt)):
        raise InvalidRequest("prompt_2", f"{len(second)} for {len(prompt)} prompts")
    return (prompt, second or prompt)[: len(bundle.text_encoders)]


def _negative_prompts(read: Reader, bundle: Bundle, count: int) -> tuple[tuple[str, ...], ...] | None:
    if "negative_prompt" not in read:
        if "negative_prompt_2" in read:
            raise InvalidRequest("negative_prompt_2", "needs a negative_prompt")
        return None
    first = spread("negative_prompt", read.texts("negative_prompt"), count, "", "prompts")
    second = read.texts("negative_prompt_2")
    return (first, spread("negative_prompt_2", second, count, "", "prompts") if second else first)[
        : len(bundle.text_encoders)
    ]


def _start(read: Reader, bundle: Bundle, pictures: int, clip: Clip | None) -> StartImages:
    given = {name: [images.decode(data, name) for data in read.data(name)] for name in ("image", "mask_image")}
    if given["mask_image"] and not given["image"]:
        raise InvalidRequest("mask_image", "needs an image")
    for name, decoded in given.items():
        if decoded and pictures % len(decoded):
            raise InvalidRequest(name, f"{len(decoded)} pictures cannot be spread over {pictures} results")
    crop = read.integer("padding_mask_crop", 0, 0, 4096) if "padding_mask_crop" in read else None
    if crop is not None and (len(given["mask_image"]) != 1 or len(given["image"]) != 1):
        raise InvalidRequest("padding_mask_crop", "needs one image and one mask_image")
    if crop is not None and given["mask_image"][0].size != given["image"][0].size:
        raise InvalidRequest("mask_image", "must have the size of image where padding_mask_crop is given")
    if crop is not None and not np.asarray(given["mask_image"][0].convert("L")).any():
        raise InvalidRequest("mask_image", "is all black: there is nothing to crop to")
    video = clip.video if clip is not None else ()
    if "strength" in read and not given["image"] and not video:
        raise InvalidRequest("strength", "needs an image or a video")
    if video:
        return StartImages(images=video)
    return StartImages(images=tuple(given["image"]), masks=tuple(given["mask_image"]), mask_crop=crop)


def _output_format(read: Reader, formats: tuple[str, ...]) -> str | None:
    if "output_format" in read and read.text("output_type") == "latent":
        raise InvalidRequest(
            "output_format", "latents are not pictures; leave one of output_format and output_type out"
        )
    return read.choice("output_format", formats, formats[0]) if "output_format" in read else None


def _strength(read: Reader, bundle: Bundle, task: Task, controls: tuple[Control, ...]) -> float:
    """Defaults of diffusers: 1.0 for SD1.5 inpainting, 0.9999 for SDXL's, and that of its image-to-image pipelines."""
    if task == "inpainting":
        default = 0.9999 if bundle.family == "sdxl" else 1.0
    else:
        default = 0.3 if bundle.family == "sdxl" and not controls else 0.8
    strength = read.number("strength", default, 0.0, 1.0)
    if strength == 0:
        raise InvalidRequest("strength", "must be above 0 and at most 1, got 0")
    return strength


def _default_guidance(bundle: Bundle, task: Task, controls: tuple[Control, ...]) -> float:
    """Defaults of diffusers' pipelines: 7.5, but 5.0 for SDXL, unless it inpaints without a ControlNet."""
    return 5.0 if bundle.family == "sdxl" and (controls or task != "inpainting") else 7.5


def _size(
    read: Reader,
    bundle: Bundle,
    task: Task,
    start: StartImages,
    controls: tuple[Control, ...],
    clip: Clip | None,
) -> tuple[int, int]:
    """Height and width; by default those of the bundle, or of the picture that diffusers' pipelines take them from.

    That is the start picture of image-to-image, the control image, and the start picture of inpainting with one; down
    to a multiple of the VAE's factor.
    """
    height, width, asked = bundle.default_height, bundle.default_width, None
    first = None
    if clip is not None:
        pass
    elif task == "image-to-image" or (controls and start.images):
        first, asked = start.images[0], "image"
    elif controls:
        first, asked = controls[0].images[0], "control_image"
    if first is not None:
        height, width = (size - size % bundle.vae_scale_factor for size in (first.height, first.width))
    used = [bundle.t2i_adapter(control.use.name) for control in controls]
    factor = max([8, *(adapter.downscale_factor for adapter in used if adapter is not None)])
    sizes = []
    for name, default in (("height", height), ("width", width)):
        low, _, high = getattr(bundle.shapes, name)
        value = read.integer(name, default, low, high)
        if not low <= value <= high:
            raise InvalidRequest(asked or name, f"{name} must be {low} to {high}, got {value}")
        if value % factor:
            raise InvalidRequest(name, f"must be a multiple of {factor}, got {value}")
        sizes.append(value)
    return sizes[0], sizes[1]


def _size_conditions(read: Reader) -> SizeConditions:
    return SizeConditions(
        original_size=read.pair("original_size"),
        crops_coords_top_left=read.pair("crops_coords_top_left") or (0, 0),
        target_size=read.pair("target_size"),
        negative_original_size=read.pair("negative_original_size"),
        negative_crops_coords_top_left=read.pair("negative_crops_coords_top_left") or (0, 0),
        negative_target_size=read.pair("negative_target_size"),
    )
