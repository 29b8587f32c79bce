"""What the pipeline asks of the denoiser, beside tensors."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from imprompt_serving.backends import get_backend
from imprompt_serving.parameters import PARAMETERS, Settings
from imprompt_serving.specs import Bundle

Scale = float | dict[str, Any] | list[float]
Task = Literal["text-to-image", "image-to-image", "inpainting"]


class AdapterUse(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter in one request; its embeddings and masks travel as tensors.

    ``scale`` is a number, diffusers' scales by block, or a number for each masked image; it is multiplied by the
    spread of ``weight_type`` over the layers, and is 0 outside of ``start`` to ``end`` (shares of the steps).
    """

    name: str
    scale: Scale = PARAMETERS["ip_adapter_scale"].default
    start: float = PARAMETERS["ip_adapter_start"].default
    end: float = PARAMETERS["ip_adapter_end"].default
    weight_type: str = PARAMETERS["ip_adapter_weight_type"].default


class ControlUse(msgspec.Struct, frozen=True, kw_only=True):
    """A ControlNet in one request, active from ``start`` to ``end`` of the steps; its images travel as a tensor."""

    name: str
    scale: float = 1.0
    start: float = PARAMETERS["control_guidance_start"].default
    end: float = PARAMETERS["control_guidance_end"].default


class ContextWindow(msgspec.Struct, frozen=True, kw_only=True):
    """Overlapping windows of frames, in which clips run that are longer than ``length``."""

    length: int
    stride: int = PARAMETERS["context_stride"].default
    overlap: int = PARAMETERS["context_overlap"].default


class JobRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One denoising job. ``seeds`` has one entry for all pictures together, or one for each."""

    id: str
    task: Task = "text-to-image"
    settings: Settings
    seeds: tuple[int, ...]
    adapters: tuple[AdapterUse, ...] = ()
    controls: tuple[ControlUse, ...] = ()
    frames: int | None = None
    """Frames of each clip; None for pictures."""
    context: ContextWindow | None = None
    """Set for clips: a window for clips that are longer than it."""
    timeout: float | None = None
    """Seconds left on arrival in the denoiser."""
    reports_progress: bool = False


class Admission(msgspec.Struct, frozen=True, kw_only=True):
    """The question whether a job may come; if so, a place in the waiting line is kept for it."""

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
) -> str:
    """Equal for jobs whose rows can share a call of the UNet.

    Args:
        frames: of each clip; None for pictures.
        context: the window in which longer clips run.
        regions: whether an adapter has several masked images. Engines that are built for ranges of shapes have a
            profile of their own for these, which long lists of pictures do not fit.
    """
    sizes = [settings.height, settings.width]
    if frames is not None:
        sizes.insert(0, frames if context is None else min(frames, context.length))
    apart = regions and get_backend(bundle.backend).builds_for_ranges
    return " ".join(["x".join(map(str, sizes)), *(["regions"] if apart else []), *lora_set(settings)])


def lora_set(settings: Settings) -> tuple[str, ...]:
    """Equal for jobs that run on the same weights."""
    return tuple(f"{name}={scale}" for name, scale in sorted(settings.lora.items()))
