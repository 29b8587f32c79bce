"""What the pipeline asks of the denoiser, beside tensors."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from imprompt_serving.parameters import PARAMETERS, Settings

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


class Context(msgspec.Struct, frozen=True, kw_only=True):
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
    context: Context | None = None
    """Set for clips: a window for clips that are longer than it."""
    timeout: float | None = None
    """Seconds left on arrival in the denoiser."""
    reports_progress: bool = False

    @property
    def shape(self) -> str:
        return shape_of(self.settings.height, self.settings.width, self.frames)


class Admission(msgspec.Struct, frozen=True, kw_only=True):
    """The question whether a job may come; if so, a place in the waiting line is kept for it."""

    id: str
    rows: int
    steps: int
    shape: str


def shape_of(height: int, width: int, frames: int | None) -> str:
    """Equal for jobs that may share a call of the UNet."""
    return f"{frames or 1}x{height}x{width}"
