"""The plain values of a denoising job, which the pipeline sends to the denoiser next to tensors."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from imprompt_serving.backends import get_backend
from imprompt_serving.parameters import PARAMETERS, Settings
from imprompt_serving.specs import Bundle

Scale = float | dict[str, Any] | list[float]
Task = Literal["text-to-image", "image-to-image", "inpainting"]


class AdapterOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How one request uses an adapter; its embeddings and masks are sent as tensors.

    `scale` is a number, diffusers' scales by block, or a number for each masked image. It is multiplied by the layer
    weights of `weight_type`, and is 0 outside `start` to `end` (fractions of the steps). Its pictures are divided among
    prompts or keyframes if `per` says so.
    """

    name: str
    scale: Scale = PARAMETERS["ip_adapter_scale"].default
    start: float = PARAMETERS["ip_adapter_start"].default
    end: float = PARAMETERS["ip_adapter_end"].default
    weight_type: str = PARAMETERS["ip_adapter_weight_type"].default
    per: str = PARAMETERS["ip_adapter_image_per"].default
    keyframes: tuple[int, ...] = ()
    """The frames that have pictures; only for pictures per frame."""

    def shares(self, prompts: int) -> int:
        """Return the number of equal shares that its pictures are divided into, for a request with `prompts`."""
        return {"prompt": prompts, "frame": len(self.keyframes)}.get(self.per, 1)


class ControlOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How one request uses a ControlNet; its images are sent as a tensor.

    It is active from `start` to `end` (fractions of the steps).
    """

    name: str
    scale: float = 1.0
    start: float = PARAMETERS["control_guidance_start"].default
    end: float = PARAMETERS["control_guidance_end"].default


class ContextWindow(msgspec.Struct, frozen=True, kw_only=True):
    """Overlapping windows of frames, for clips longer than `length` frames."""

    length: int
    stride: int = PARAMETERS["context_stride"].default
    overlap: int = PARAMETERS["context_overlap"].default


class JobRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One denoising job. `seeds` has one entry for all pictures together, or one per picture."""

    id: str
    task: Task = "text-to-image"
    settings: Settings
    seeds: tuple[int, ...]
    adapters: tuple[AdapterOptions, ...] = ()
    controls: tuple[ControlOptions, ...] = ()
    frames: int | None = None
    """Frames of each clip; None for pictures."""
    context: ContextWindow | None = None
    """The windows of clips; None for pictures."""
    timeout: float | None = None
    """Seconds left when the job arrives at the denoiser."""
    reports_progress: bool = False


class Admission(msgspec.Struct, frozen=True, kw_only=True):
    """Asks whether the denoiser can take a job, and if so, reserves a place in its queue."""

    id: str
    rows: int
    steps: int
    batch_key: str


def batch_key(
    bundle: Bundle,
    settings: Settings,
    frames: int | None,
    context: ContextWindow | None,
    *,
    regions: bool,
    text_tokens: int,
) -> str:
    """Return a key that is equal for jobs whose rows can share a UNet call.

    Args:
        frames: frames of each clip; None for pictures.
        context: the windows of clips that are longer than a window.
        regions: whether an adapter has several masked images. Engines built for ranges of shapes have a separate
            profile for these, which cannot run long lists of pictures.
        text_tokens: length of the text embeddings. Rows are padded by repeating their tokens, so lengths can share a
            call if they differ by a power of two.
    """
    sizes = [settings.height, settings.width]
    if frames is not None:
        sizes.insert(0, frames if context is None else min(frames, context.length))
    separate = regions and get_backend(bundle.backend).builds_for_ranges
    parts = ["x".join(map(str, sizes)), f"text{text_tokens // (text_tokens & -text_tokens)}"]
    return " ".join([*parts, *(["regions"] if separate else []), *lora_set(settings)])


def lora_set(settings: Settings) -> tuple[str, ...]:
    """Return a value that is equal for jobs that run with the same LoRAs and scales."""
    return tuple(f"{name}={scale}" for name, scale in sorted(settings.lora.items()))
