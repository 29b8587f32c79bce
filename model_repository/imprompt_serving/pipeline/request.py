"""Parse the tensors of a request into a validated `Request`; errors name the parameter."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image

from imprompt_serving.errors import InvalidRequest, shown
from imprompt_serving.families import Family, get_family
from imprompt_serving.job_request import ContextWindow, Task
from imprompt_serving.parameters import MAX_SCALE, PARAMETERS, PICTURE_FORMATS, ROWS, VIDEO_FORMATS, Settings, Type
from imprompt_serving.pipeline.controls import Control, ControlPlan, load_controls, plan_controls
from imprompt_serving.pipeline.image_prompts import (
    ImagePrompt,
    Targets,
    adapter_name,
    load_image_prompt,
    plan_image_prompts,
)
from imprompt_serving.pipeline.images import check_count, check_headers, decode_all
from imprompt_serving.pipeline.prompts import TextPrompts, check_lengths, parse_prompts
from imprompt_serving.pipeline.reader import Reader
from imprompt_serving.pipeline.scheduler import parse_scheduler
from imprompt_serving.pipeline.video import VideoOptions, parse_video
from imprompt_serving.scheduler_names import CUSTOM_STEPS
from imprompt_serving.specs import Bundle, Limits
from imprompt_serving.wire import request_tensors

_MAX_PICTURES = int(PARAMETERS["num_images_per_prompt"].high)


@dataclass(frozen=True, kw_only=True, slots=True)
class StartImages:
    """Pictures (or frames) to start from, masks of what to repaint, and the margin of a mask crop in pixels."""

    images: tuple[Image.Image, ...] = ()
    masks: tuple[Image.Image, ...] = ()
    mask_crop: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A validated request, with the defaults of diffusers' pipelines filled in."""

    task: Task
    text: TextPrompts
    image_prompts: tuple[ImagePrompt, ...]
    start: StartImages
    image_latents: np.ndarray | None
    """Latents to start from in place of pictures [N, C, h, w]."""
    latents: np.ndarray | None
    """Initial noise [N, C, h, w], for clips [N, C * F, h, w]; None to draw it from the seeds."""
    video: VideoOptions | None
    controls: tuple[Control, ...]
    seeds: tuple[int, ...]
    """One seed for all results together, or one per result."""
    encode_image: str | None
    """The adapter whose embeddings are requested, instead of pictures."""
    encode_prompt: bool
    """Whether text embeddings are requested, instead of pictures."""
    timeout: float
    """Seconds since the request arrived at the pipeline."""
    settings: Settings

    @property
    def pictures(self) -> int:
        """Number of results: pictures or clips."""
        return self.text.count * self.settings.num_images_per_prompt

    @property
    def regions(self) -> bool:
        """Whether an adapter has several masked images."""
        return any(prompt.groups > 1 for prompt in self.image_prompts)

    @property
    def context(self) -> ContextWindow | None:
        """The windows of clips; None for pictures."""
        return None if self.video is None else self.video.context

    @property
    def frames(self) -> int | None:
        """Frames of each clip; None for pictures."""
        return None if self.video is None else self.video.frames


def parse(tensors: Mapping[str, np.ndarray], bundle: Bundle) -> Request:
    """Parse a request, and check everything that can be checked before any engine runs. Pictures are decoded last.

    Raises:
        InvalidRequest: names the first invalid parameter, and says what is allowed.
    """
    known = {tensor.name for tensor in request_tensors(bundle, stream=True)}
    for name in tensors:
        if name not in known:
            raise InvalidRequest(name, f"is not a parameter of {bundle.name}")
    limits, read, family = bundle.limits, Reader(tensors, bundle.limits, bundle.defaults), get_family(bundle.family)
    picture_names = [row.name for row in ROWS if row.type is Type.PICTURES]
    check_count({name: read.count(name) for name in picture_names}, limits)
    check_headers({name: read.pictures(name) for name in picture_names}, limits)
    text = parse_prompts(read, bundle)
    encode_prompt = read.flag("encode_prompt")
    if encode_prompt and text.embeds:
        raise InvalidRequest("encode_prompt", f"cannot be combined with {', '.join(text.embeds)}")
    pictures = text.count * read.integer("num_images_per_prompt")
    if pictures > _MAX_PICTURES:
        raise InvalidRequest(
            "num_images_per_prompt", f"{pictures} pictures exceed the limit of {_MAX_PICTURES} per request"
        )
    video = parse_video(read, bundle, pictures)
    frames = None if video is None else video.frames
    image_latents = _image_latents(read, bundle, pictures)
    task = _task(read, bundle, pictures)
    if not encode_prompt and "encode_image" not in read:
        _check_task(task, bundle)
    _check_window(read, task)
    controls = plan_controls(read, bundle, task, text.count, frames)
    step = _size_step(bundle, controls)
    sides = {name: _side(read, bundle, name, step) for name in ("height", "width")}
    encode_image = adapter_name(read.text("encode_image"), bundle, "encode_image")
    targets = Targets(prompts=text.count, frames=frames)
    image_prompts = plan_image_prompts(read, bundle, encode_image, targets)
    _check_steps(steps := _steps(read, bundle), limits, pictures * (frames or 1))
    seeds = read.integers("seed")
    if len(seeds) not in (0, 1, pictures):
        raise InvalidRequest(
            "seed", f"expected one value, or one for each of the {pictures} pictures; got {len(seeds)}"
        )
    timeout = min(read.number("timeout", default=limits.timeout_seconds), limits.timeout_seconds)
    settings = _settings(read, bundle, family, task, controls, video, steps)
    start, loaded = _load_start(read), load_controls(controls)
    height, width = _size(bundle, task, start, image_latents, loaded, video, sides, step)
    request = Request(
        task=task,
        text=text,
        image_prompts=tuple(map(load_image_prompt, image_prompts)),
        start=start,
        image_latents=image_latents,
        latents=_latents(read, bundle, task, (pictures, frames or 1, height, width)),
        video=video,
        controls=loaded,
        seeds=seeds or tuple(secrets.randbelow(2**32) for _ in range(pictures)),
        encode_image=encode_image,
        encode_prompt=encode_prompt,
        timeout=timeout,
        settings=Settings(**settings, height=height, width=width),
    )
    if encode_image is None and bundle.guided(request):
        _check_negatives(request)
        check_lengths(request.text, bundle)
    return request


def _steps(read: Reader, bundle: Bundle) -> int:
    """Return the number of denoising steps, and check custom ones."""
    given = [name for name in CUSTOM_STEPS if name in read]
    if len(given) > 1:
        raise InvalidRequest(given[1], f"cannot be combined with {given[0]}")
    for name in given:
        values = read.integers(name) if name == "timesteps" else read.numbers(name)
        if not 1 <= len(values) <= PARAMETERS["num_inference_steps"].high:
            raise InvalidRequest(name, f"expected 1 to {PARAMETERS['num_inference_steps'].high:g} values")
        if any(later >= earlier for earlier, later in pairwise(values)) or min(values) < 0:
            raise InvalidRequest(name, "must be in descending order, and at least 0")
        scheduler, _ = parse_scheduler(read, bundle.limits)
        if (scheduler or bundle.scheduler) not in CUSTOM_STEPS[name]:
            known = ", ".join(CUSTOM_STEPS[name])
            raise InvalidRequest(name, f"{scheduler or bundle.scheduler} does not take {name}; use one of {known}")
        return len(values)
    return read.integer("num_inference_steps")


def _check_steps(steps: int, limits: Limits, frames: int) -> None:
    """Refuse too many steps in total, with `frames` pictures or frames of clips."""
    if steps * frames > limits.sample_steps:
        problem = f"{steps} steps for {frames} pictures or frames make {steps * frames}"
        raise InvalidRequest("num_inference_steps", f"{problem}; at most {limits.sample_steps} per request")


def _check_window(read: Reader, task: Task) -> None:
    """Check `denoising_start` and `denoising_end`."""
    bounds = {name: read.number(name) for name in ("denoising_start", "denoising_end") if name in read}
    for name, value in bounds.items():
        if not 0 < value < 1:
            raise InvalidRequest(name, f"must be above 0 and below 1, got {value:g}")
    if "denoising_start" in bounds and task == "text-to-image":
        raise InvalidRequest("denoising_start", "needs an image")
    if len(bounds) == 2 and bounds["denoising_start"] >= bounds["denoising_end"]:
        raise InvalidRequest("denoising_start", "must be below denoising_end")


def _settings(
    read: Reader,
    bundle: Bundle,
    family: Family,
    task: Task,
    controls: Sequence[ControlPlan],
    video: VideoOptions | None,
    steps: int,
) -> dict[str, Any]:
    """Parse the values of `Settings` except height and width; defaults come from the table, the family, or the task."""
    scheduler, scheduler_config = parse_scheduler(read, bundle.limits)
    guidance_scale = family.default_guidance_scale(task, controlled=bool(controls))
    settings = {
        "guidance_scale": read.number("guidance_scale", default=guidance_scale),
        "strength": _strength(read, task, steps, default=family.default_strength(task, controlled=bool(controls))),
        "timesteps": read.integers("timesteps"),
        "sigmas": read.numbers("sigmas"),
        **{name: read.number(name) if name in read else None for name in ("denoising_start", "denoising_end")},
        "clip_skip": read.integer("clip_skip", high=bundle.max_clip_skip),
        "scheduler": scheduler,
        "scheduler_config": scheduler_config,
        "lora": _loras(read, bundle),
        "output_format": _output_format(read, PICTURE_FORMATS if video is None else VIDEO_FORMATS),
        "output_encoding": _output_encoding(read),
    }
    others = {*Settings.__struct_fields__} - {*settings, "height", "width"}
    return settings | {name: read.setting(name) for name in others}


def _loras(read: Reader, bundle: Bundle) -> dict[str, float]:
    """Return the scales of the LoRAs in the order of the bundle, without zeros, so that equal sets compare equal."""
    row = PARAMETERS["lora"]
    scales = read.json(row.name) if row.name in read else row.default
    if not isinstance(scales, dict):
        raise InvalidRequest(row.name, f"must be a JSON object of scales by name, got {shown(scales)}")
    for name, scale in scales.items():
        if name not in bundle.loras:
            raise InvalidRequest(row.name, f"{shown(name)} is not one of {', '.join(bundle.loras)}")
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
                "with guidance, the first axis must hold negative and positive embeddings",
            )


def _task(read: Reader, bundle: Bundle, pictures: int) -> Task:
    """Return the task of a request with `pictures` results, and check its start pictures and masks."""
    images, masks, video = (read.count(name) for name in ("image", "mask_image", "video"))
    if masks and not images:
        raise InvalidRequest("mask_image", "needs an image")
    for name, count in (("image", images), ("mask_image", masks)):
        if count and pictures % count:
            raise InvalidRequest(name, f"{count} pictures cannot be divided among {pictures} results")
    if masks > 1 and images > 1 and masks != images:
        raise InvalidRequest(
            "mask_image", f"expected one picture, or one for each of the {images} pictures in image; got {masks}"
        )
    if "padding_mask_crop" in read and (masks != 1 or images != 1):
        raise InvalidRequest("padding_mask_crop", "needs one image and one mask_image")
    starts = images or video or "image_latents" in read
    if "strength" in read and not starts:
        raise InvalidRequest("strength", "needs an image or a video")
    return "inpainting" if masks else "image-to-image" if starts else "text-to-image"


def _check_task(task: Task, bundle: Bundle) -> None:
    """Check that the checkpoints can do `task`: some only change pictures."""
    if bundle.plain_task == "inpainting" and task != "inpainting":
        raise InvalidRequest("mask_image", f"{bundle.name} is an inpainting model, which needs image and mask_image")
    if bundle.plain_task == "image-to-image" and task == "text-to-image":
        raise InvalidRequest("image", f"{bundle.name} only changes pictures: it needs an image to start from")


def _image_latents(read: Reader, bundle: Bundle, pictures: int) -> np.ndarray | None:
    """Read the latents that take the place of `image`."""
    name = "image_latents"
    if name not in read:
        return None
    latents, channels = read.floats(name), bundle.latent_channels
    for other in ("image", "mask_image", "video", "num_frames", "latents"):
        if other in read:
            raise InvalidRequest(name, f"cannot be combined with {other}")
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise InvalidRequest(name, f"must have shape [pictures, {channels}, h, w], got {list(latents.shape)}")
    if not len(latents) or pictures % len(latents):
        raise InvalidRequest(name, f"{len(latents)} pictures cannot be divided among {pictures} results")
    return _checked_values(name, latents)


def _latents(read: Reader, bundle: Bundle, task: Task, size: tuple[int, int, int, int]) -> np.ndarray | None:
    """Read the initial noise for results of `size`: their number, and the frames, height, and width of each."""
    name = "latents"
    if name not in read:
        return None
    if task == "image-to-image":
        raise InvalidRequest(
            name, "does not apply to image-to-image and video-to-video, whose noise depends on strength"
        )
    latents, (count, frames, height, width) = read.floats(name), size
    factor = bundle.vae_scale_factor
    expected = (count, bundle.latent_channels * frames, height // factor, width // factor)
    if latents.shape != expected:
        raise InvalidRequest(name, f"must have shape {list(expected)}, got {list(latents.shape)}")
    return _checked_values(name, latents)


def _checked_values(name: str, values: np.ndarray) -> np.ndarray:
    if not (np.abs(values) <= MAX_SCALE).all():  # NaN too
        raise InvalidRequest(name, f"must be finite, from {-MAX_SCALE:g} to {MAX_SCALE:g}")
    return values


def _load_start(read: Reader) -> StartImages:
    """Decode the pictures to start from."""
    crop = read.integer("padding_mask_crop") if "padding_mask_crop" in read else None
    video = decode_all(read.pictures("video"), "video")
    images, masks = (
        video or decode_all(read.pictures("image"), "image"),
        decode_all(read.pictures("mask_image"), "mask_image"),
    )
    if crop is not None and masks[0].size != images[0].size:
        raise InvalidRequest("mask_image", "must have the size of image if padding_mask_crop is set")
    if crop is not None and masks[0].convert("L").getbbox() is None:
        raise InvalidRequest("mask_image", "is all black: there is nothing to crop to")
    return StartImages(images=images, masks=masks, mask_crop=crop)


def _output_format(read: Reader, formats: tuple[str, ...]) -> str | None:
    if "output_format" in read and read.text("output_type") == "latent":
        raise InvalidRequest("output_format", "cannot be combined with output_type latent")
    chosen = read.choice("output_format")
    if chosen is not None and chosen not in formats:
        raise InvalidRequest("output_format", f"{chosen!r} is not one of {', '.join(formats)}")
    return chosen


def _output_encoding(read: Reader) -> str:
    encoding = read.choice("output_encoding") or ""
    if encoding == "base64" and "output_format" not in read:
        raise InvalidRequest("output_encoding", "base64 needs an output_format: raw pixels are numbers in JSON")
    return encoding


def _strength(read: Reader, task: Task, steps: int, *, default: float) -> float:
    strength = read.number("strength", default=default)
    if strength == 0:
        raise InvalidRequest("strength", "must be above 0 and at most 1, got 0")
    if task != "text-to-image" and "denoising_start" not in read and int(steps * strength) < 1:
        raise InvalidRequest(
            "strength", f"{strength:g} of {steps} steps is less than one step; increase strength or num_inference_steps"
        )
    return strength


def _size_step(bundle: Bundle, controls: Sequence[ControlPlan]) -> int:
    """Return what height and width must be multiples of: the factors of the VAE and of the T2I-Adapters in use."""
    used = [bundle.t2i_adapter(control.options.name) for control in controls]
    return math.lcm(bundle.vae_scale_factor, *(adapter.downscale_factor for adapter in used if adapter is not None))


def _side(read: Reader, bundle: Bundle, name: str, step: int) -> int | None:
    """Parse height or width; None if absent."""
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
    image_latents: np.ndarray | None,
    controls: tuple[Control, ...],
    video: VideoOptions | None,
    sides: Mapping[str, int | None],
    step: int,
) -> tuple[int, int]:
    """Return height and width. The defaults are those of the bundle, or of the picture that diffusers' pipelines use.

    That is the start picture for image-to-image and for inpainting with a ControlNet, and otherwise the control image;
    both sides are rounded down to a multiple of `step`.
    """
    source: str | None = None
    width, height = bundle.default_width, bundle.default_height
    if image_latents is not None:
        source = "image_latents"
        height, width = (size * bundle.vae_scale_factor for size in image_latents.shape[2:])
    elif video is None and (task == "image-to-image" or (controls and start.images)):
        source, (width, height) = "image", start.images[0].size
    elif video is None and controls:
        source, (width, height) = "control_image", controls[0].images[0].size
    sizes = []
    for name, default in (("height", height), ("width", width)):
        value, (low, _, high) = sides[name], getattr(bundle.shapes, name)
        if value is None and source is not None:
            value = default - default % step
            if not low <= value <= high:
                problem = f"a picture of {width}x{height} gives {name} {value}, but it must be {low} to {high}"
                raise InvalidRequest(source, f"{problem}; set height and width, or resize the picture")
        if image_latents is not None and value is not None and value != default:
            raise InvalidRequest(name, f"must be that of the latents, {default}, got {value}")
        sizes.append(value or default)
    size = sizes[0], sizes[1]
    if bundle.sizes and size not in bundle.sizes:
        served = ", ".join(f"{height}x{width}" for height, width in bundle.sizes)
        raise InvalidRequest("height", f"with width: must be {served} (height x width), got {size[0]}x{size[1]}")
    return size
