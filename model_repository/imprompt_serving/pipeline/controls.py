"""Parse the ControlNets of a request: nets, control images, scales, and active steps."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from imprompt_serving.errors import InvalidRequest, shown
from imprompt_serving.families import get_family
from imprompt_serving.job_request import ControlOptions, Task
from imprompt_serving.pipeline.annotators import annotate
from imprompt_serving.pipeline.images import decode_all
from imprompt_serving.pipeline.reader import Reader
from imprompt_serving.specs import Bundle

_PARAMETERS = (
    "controlnet",
    "control_image_annotator",
    "controlnet_conditioning_scale",
    "control_guidance_start",
    "control_guidance_end",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Control:
    """A ControlNet of a request, with one image for all results, or one per prompt (for clips, per frame)."""

    images: tuple[Image.Image, ...]
    mode: str
    """Pillow mode of the images that the net takes."""
    options: ControlOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlPlan:
    """A validated `Control` whose pictures are not decoded yet."""

    files: tuple[bytes, ...]
    annotator: str
    mode: str
    options: ControlOptions


def plan_controls(
    read: Reader, bundle: Bundle, task: Task, prompts: int, frames: int | None
) -> tuple[ControlPlan, ...]:
    """Parse the ControlNets of a request, in its order; empty without control images. `frames` is set for clips."""
    files, names = read.pictures("control_image"), read.texts("controlnet")
    if not files:
        for name in _PARAMETERS:
            if name in read:
                raise InvalidRequest("control_image", f"{name} needs a control image")
        return ()
    names = _names(names, bundle)
    if frames is not None and any(bundle.t2i_adapter(name) for name in names):
        raise InvalidRequest("controlnet", "T2I-Adapters do not support clips")
    each = len(files) // len(names)
    expected, what = (prompts, "prompt") if frames is None else (frames, "frame")
    if len(files) % len(names) or each not in (1, expected):
        choice = f", or {expected} (one per {what})" if expected > 1 else ""
        problem = f"expected one picture for each of {', '.join(names)}{choice}"
        raise InvalidRequest("control_image", f"{problem}; got {len(files)}")
    annotators = read.one_or_each("control_image_annotator", len(names), "ControlNets")
    nets = _options(read, names, 1.0 if frames else get_family(bundle.family).default_conditioning_scale(task))
    return tuple(
        ControlPlan(
            files=tuple(files[index * each : (index + 1) * each]),
            annotator=annotator,
            mode=_mode(bundle, options.name),
            options=options,
        )
        for index, (options, annotator) in enumerate(zip(nets, annotators, strict=True))
    )


def load_controls(plans: tuple[ControlPlan, ...]) -> tuple[Control, ...]:
    """Decode the control images, and run the annotators."""
    pictures = iter(decode_all([file for plan in plans for file in plan.files], "control_image"))
    return tuple(
        Control(
            images=tuple(annotate(next(pictures), plan.annotator) for _ in plan.files),
            mode=plan.mode,
            options=plan.options,
        )
        for plan in plans
    )


def _names(names: tuple[str, ...], bundle: Bundle) -> tuple[str, ...]:
    known = bundle.net_names
    for name in names:
        if name not in known:
            raise InvalidRequest("controlnet", f"no ControlNet {shown(name)}; {bundle.name} has {', '.join(known)}")
    if len(set(names)) < len(names):
        raise InvalidRequest("controlnet", f"must name each net at most once, got {', '.join(names)}")
    return names or known


def _mode(bundle: Bundle, name: str) -> str:
    adapter = bundle.t2i_adapter(name)
    return "L" if adapter is not None and adapter.channels == 1 else "RGB"


def _options(read: Reader, names: tuple[str, ...], default: float) -> list[ControlOptions]:
    count, what = len(names), "ControlNets"
    scales = read.one_or_each("controlnet_conditioning_scale", count, what, default=default)
    starts = read.one_or_each("control_guidance_start", count, what)
    ends = read.one_or_each("control_guidance_end", count, what)
    for start, end in zip(starts, ends, strict=True):
        if start >= end:
            raise InvalidRequest("control_guidance_start", f"{start:g} is not before control_guidance_end {end:g}")
    together = zip(names, scales, starts, ends, strict=True)
    return [ControlOptions(name=name, scale=scale, start=start, end=end) for name, scale, start, end in together]
