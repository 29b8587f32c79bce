"""Tensors of a request -> a checked ``Request``; whatever is wrong is refused here, by the parameter's name."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from imprompt_serving import tensor_names
from imprompt_serving.errors import InvalidRequest, shown
from imprompt_serving.families import Family, get_family
from imprompt_serving.job import ContextWindow, Task
from imprompt_serving.parameters import PARAMETERS, PICTURE_FORMATS, ROWS, VIDEO_FORMATS, Settings, Type
from imprompt_serving.pipeline.clips import Clip, parse_clip
from imprompt_serving.pipeline.controls import Control, ControlPlan, load_controls, plan_controls
from imprompt_serving.pipeline.image_prompts import ImagePrompt, adapter_name, load_image_prompt, plan_image_prompts
from imprompt_serving.pipeline.images import check_headers, decode_all
from imprompt_serving.pipeline.reader import Reader
from imprompt_serving.pipeline.scheduler import parse_scheduler
from imprompt_serving.specs import Bundle, Limits
from imprompt_serving.wire import request_tensors

_MAX_PICTURES = int(PARAMETERS["num_images_per_prompt"].high)


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
    seeds: tuple[int, ...]
    """One for all results together, or one each."""
    encode_image: str | None
    timeout: float
    """Seconds from arrival in the pipeline."""
    settings: Settings

    @property
    def pictures(self) -> int:
        """Results: pictures or clips."""
        return len(self.prompts[0]) * self.settings.num_images_per_prompt

    @property
    def regions(self) -> bool:
        """Whether an adapter has several masked images."""
        return any(len(prompt.masks) > 1 for prompt in self.image_prompts)

    @property
    def context(self) -> ContextWindow | None:
        """The window of a clip."""
        return None if self.clip is None else self.clip.context

    @property
    def frames(self) -> int | None:
        """Frames of each clip; None for pictures."""
        return None if self.clip is None else self.clip.frames


def parse(tensors: Mapping[str, np.ndarray], bundle: Bundle) -> Request:
    """Check everything that can be checked before any engine runs; pictures are decoded when all else is right.

    Raises:
        InvalidRequest: the first parameter that is wrong, and what is allowed.
    """
    known = {tensor.name for tensor in request_tensors(bundle, stream=True)}
    for name in tensors:
        if name not in known:
            raise InvalidRequest(name, f"is no parameter of {bundle.name}")
    limits, read, family = bundle.limits, Reader(tensors, bundle.limits), get_family(bundle.family)
    check_headers({row.name: read.data(row.name) for row in ROWS if row.type is Type.PICTURES}, limits)
    _check_characters(read, limits, family)
    prompts = _prompts(read, family)
    pictures = len(prompts[0]) * read.integer("num_images_per_prompt")
    if pictures > _MAX_PICTURES:
        raise InvalidRequest(
            "num_images_per_prompt", f"{pictures} pictures asked for; at most {_MAX_PICTURES} a request"
        )
    clip = parse_clip(read, bundle, pictures)
    frames = None if clip is None else clip.frames
    task = _task(read, bundle, pictures)
    controls = plan_controls(read, bundle, task, len(prompts[0]), frames)
    step = _size_step(bundle, controls)
    sides = {name: _side(read, bundle, name, step) for name in ("height", "width")}
    encode_image = adapter_name(read.text("encode_image"), bundle, "encode_image")
    image_prompts = plan_image_prompts(read, bundle, encode_image)
    _check_steps(read, limits, pictures * (frames or 1))
    seeds = read.integers("seed")
    if len(seeds) not in (0, 1, pictures):
        raise InvalidRequest("seed", f"one for all or one for each of {pictures} pictures, got {len(seeds)}")
    negative_prompts = _negative_prompts(read, family, len(prompts[0]))
    timeout = min(read.number("timeout", default=limits.timeout_seconds), limits.timeout_seconds)
    settings = _settings(read, bundle, family, task, controls, clip)
    start, loaded = _load_start(read), load_controls(controls)
    height, width = _size(bundle, task, start, loaded, clip, sides, step)
    request = Request(
        task=task,
        prompts=prompts,
        negative_prompts=negative_prompts,
        image_prompts=tuple(map(load_image_prompt, image_prompts)),
        start=start,
        clip=clip,
        controls=loaded,
        seeds=seeds or tuple(secrets.randbelow(2**32) for _ in range(pictures)),
        encode_image=encode_image,
        timeout=timeout,
        settings=Settings(**settings, height=height, width=width),
    )
    if encode_image is None and bundle.guided(request):
        _check_negatives(request)
    return request


def _check_characters(read: Reader, limits: Limits, family: Family) -> None:
    """Refuse long prompts before they are made into tokens."""
    count = 0
    for name in (prefix + prompt for prompt in family.prompts for prefix in ("", tensor_names.NEGATIVE)):
        count += sum(map(len, read.texts(name)))
        if count > limits.prompt_characters:
            raise InvalidRequest(name, f"the prompts of a request have at most {limits.prompt_characters} characters")


def _check_steps(read: Reader, limits: Limits, frames: int) -> None:
    """Refuse too many steps for ``frames`` pictures, or frames of clips, in all."""
    steps = read.integer("num_inference_steps")
    if steps * frames > limits.sample_steps:
        problem = f"{steps} steps for {frames} pictures or frames are {steps * frames}"
        raise InvalidRequest("num_inference_steps", f"{problem}; at most {limits.sample_steps} a request")


def _settings(
    read: Reader, bundle: Bundle, family: Family, task: Task, controls: Sequence[ControlPlan], clip: Clip | None
) -> dict[str, Any]:
    """Values of `Settings` but height and width: as the table has them, if nothing else decides."""
    scheduler, scheduler_config = parse_scheduler(read, bundle.limits)
    guidance_scale = family.default_guidance_scale(task, controlled=bool(controls))
    settings = {
        "guidance_scale": read.number("guidance_scale", default=guidance_scale),
        "strength": _strength(read, task, default=family.default_strength(task, controlled=bool(controls))),
        "clip_skip": read.integer("clip_skip", high=bundle.max_clip_skip),
        "scheduler": scheduler,
        "scheduler_config": scheduler_config,
        "lora": _loras(read, bundle),
        "output_format": _output_format(read, PICTURE_FORMATS if clip is None else VIDEO_FORMATS),
    }
    others = {*Settings.__struct_fields__} - {*settings, "height", "width"}
    return settings | {name: read.setting(name) for name in others}


def _loras(read: Reader, bundle: Bundle) -> dict[str, float]:
    """Scales of LoRAs in the order of the bundle, without those that change nothing."""
    row = PARAMETERS["lora"]
    scales = read.json(row.name) if row.name in read else row.default
    if not isinstance(scales, dict):
        raise InvalidRequest(row.name, f"must be a JSON object of scales by name, got {shown(scales)}")
    for name, scale in scales.items():
        if name not in bundle.loras:
            raise InvalidRequest(row.name, f"{shown(name)} is none of {', '.join(bundle.loras)}")
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            raise InvalidRequest(row.name, f"the scale of {name} must be a number, got {shown(scale)}")
        if not row.low <= scale <= row.high:  # NaN too
            problem = f"must be {row.low:g} to {row.high:g}, got {shown(scale)}"
            raise InvalidRequest(row.name, f"the scale of {name} {problem}")
    return {name: float(scales[name]) for name in bundle.loras if scales.get(name)}


def _check_negatives(request: Request) -> None:
    for prompt in request.image_prompts:
        if prompt.embeds is not None and len(prompt.embeds) == 1:
            raise InvalidRequest(
                "ip_adapter_image_embeds",
                "with guidance the first axis holds the negative and the positive embeddings",
            )


def _prompts(read: Reader, family: Family) -> tuple[tuple[str, ...], ...]:
    first, *others = family.prompts
    prompt = read.texts(first)
    if not prompt:
        raise InvalidRequest(first, "at least one prompt is needed")
    given = {name: read.texts(name) for name in others}
    for name, texts in given.items():
        if len(texts) not in (0, len(prompt)):
            raise InvalidRequest(name, f"{len(texts)} for {len(prompt)} prompts")
    return (prompt, *(texts or prompt for texts in given.values()))


def _negative_prompts(read: Reader, family: Family, count: int) -> tuple[tuple[str, ...], ...] | None:
    first, *others = (tensor_names.NEGATIVE + name for name in family.prompts)
    if first not in read:
        for name in others:
            if name in read:
                raise InvalidRequest(name, f"needs a {first}")
        return None
    prompt = read.one_or_each(first, count, "prompts", default="")
    return (prompt, *(read.one_or_each(name, count, "prompts") if read.texts(name) else prompt for name in others))


def _task(read: Reader, bundle: Bundle, pictures: int) -> Task:
    """The task of a request for so many results, whose start pictures fit together."""
    images, masks, video = (len(read.data(name)) for name in ("image", "mask_image", "video"))
    if masks and not images:
        raise InvalidRequest("mask_image", "needs an image")
    for name, count in (("image", images), ("mask_image", masks)):
        if count and pictures % count:
            raise InvalidRequest(name, f"{count} pictures cannot be spread over {pictures} results")
    if masks > 1 and images > 1 and masks != images:
        raise InvalidRequest("mask_image", f"one for all, or one for each of {images} images; got {masks}")
    if "padding_mask_crop" in read and (masks != 1 or images != 1):
        raise InvalidRequest("padding_mask_crop", "needs one image and one mask_image")
    if "strength" in read and not images and not video:
        raise InvalidRequest("strength", "needs an image or a video")
    task: Task = "inpainting" if masks else "image-to-image" if images or video else "text-to-image"
    if bundle.unet_channels != bundle.latent_channels and task != "inpainting":
        raise InvalidRequest("mask_image", f"{bundle.name} is an inpainting model: it needs image and mask_image")
    return task


def _load_start(read: Reader) -> StartImages:
    """Decode the pictures to start from."""
    crop = read.integer("padding_mask_crop") if "padding_mask_crop" in read else None
    video = decode_all(read.data("video"), "video")
    images, masks = video or decode_all(read.data("image"), "image"), decode_all(read.data("mask_image"), "mask_image")
    if crop is not None and masks[0].size != images[0].size:
        raise InvalidRequest("mask_image", "must have the size of image where padding_mask_crop is given")
    if crop is not None and masks[0].convert("L").getbbox() is None:
        raise InvalidRequest("mask_image", "is all black: there is nothing to crop to")
    return StartImages(images=images, masks=masks, mask_crop=crop)


def _output_format(read: Reader, formats: tuple[str, ...]) -> str | None:
    if "output_format" in read and read.text("output_type") == "latent":
        raise InvalidRequest(
            "output_format", "latents are not pictures; leave one of output_format and output_type out"
        )
    chosen = read.choice("output_format")
    if chosen is not None and chosen not in formats:
        raise InvalidRequest("output_format", f"{chosen!r} is none of {', '.join(formats)}")
    return chosen


def _strength(read: Reader, task: Task, *, default: float) -> float:
    strength = read.number("strength", default=default)
    if strength == 0:
        raise InvalidRequest("strength", "must be above 0 and at most 1, got 0")
    steps = read.integer("num_inference_steps")
    if task != "text-to-image" and int(steps * strength) < 1:
        raise InvalidRequest("strength", f"{strength:g} of {steps} steps is less than one step; raise either of them")
    return strength


def _size_step(bundle: Bundle, controls: Sequence[ControlPlan]) -> int:
    """What height and width are multiples of: the factors of the VAE, and of the T2I-Adapters in use."""
    used = [bundle.t2i_adapter(control.use.name) for control in controls]
    return math.lcm(bundle.vae_scale_factor, *(adapter.downscale_factor for adapter in used if adapter is not None))


def _side(read: Reader, bundle: Bundle, name: str, step: int) -> int | None:
    """Height or width, if given."""
    if name not in read:
        return None
    low, _, high = getattr(bundle.shapes, name)
    value = read.integer(name, low=low, high=high)
    if value % step:
        raise InvalidRequest(name, f"must be a multiple of {step}, got {value}")
    return value


def _size(
    bundle: Bundle,
    task: Task,
    start: StartImages,
    controls: tuple[Control, ...],
    clip: Clip | None,
    given: Mapping[str, int | None],
    step: int,
) -> tuple[int, int]:
    """Height and width; by default those of the bundle, or of the picture that diffusers' pipelines take them from.

    That is the start picture of image-to-image, the control image, and the start picture of inpainting with one; down
    to a multiple of ``step``.
    """
    source: str | None = None
    width, height = bundle.default_width, bundle.default_height
    if clip is None and (task == "image-to-image" or (controls and start.images)):
        source, (width, height) = "image", start.images[0].size
    elif clip is None and controls:
        source, (width, height) = "control_image", controls[0].images[0].size
    sizes = []
    for name, default in (("height", height), ("width", width)):
        value, (low, _, high) = given[name], getattr(bundle.shapes, name)
        if value is None and source is not None:
            value = default - default % step
            if not low <= value <= high:
                problem = f"a picture of {width}x{height} makes {name} {value}, and {low} to {high} are served"
                raise InvalidRequest(source, f"{problem}; set height and width, or resize the picture")
        sizes.append(value or default)
    size = sizes[0], sizes[1]
    if bundle.sizes and size not in bundle.sizes:
        served = ", ".join(f"{height}x{width}" for height, width in bundle.sizes)
        raise InvalidRequest("height", f"with width: {served} (height x width) are served, not {size[0]}x{size[1]}")
    return size
