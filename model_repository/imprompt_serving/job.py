"""What the pipeline asks of the denoiser, beside tensors."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from imprompt_serving.engines import BACKENDS
from imprompt_serving.specs import Bundle

Scale = float | dict[str, Any] | list[float]
Task = Literal["text-to-image", "image-to-image", "inpainting"]


class AdapterUse(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter in one request; its embeddings and masks travel as tensors.

    ``scale`` is a number, diffusers' scales by block, or a number for each masked image; it is multiplied by the
    spread of ``weight_type`` over the layers, and is 0 outside of ``start`` to ``end`` (shares of the steps).
    """

    name: str
    scale: Scale = 1.0
    start: float = 0.0
    end: float = 1.0
    weight_type: str = "linear"


class ControlUse(msgspec.Struct, frozen=True, kw_only=True):
    """A ControlNet in one request, active from ``start`` to ``end`` of the steps; its images travel as a tensor."""

    name: str
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0


class ContextWindow(msgspec.Struct, frozen=True, kw_only=True):
    """Overlapping windows of frames, in which clips run that are longer than ``length``."""

    length: int
    stride: int = 1
    overlap: int = 4


class SizeConditions(msgspec.Struct, frozen=True, kw_only=True):
    """SDXL's micro-conditioning, each (height, width) or (top, left); None takes diffusers' default."""

    original_size: tuple[int, int] | None = None
    crops_coords_top_left: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] | None = None
    negative_original_size: tuple[int, int] | None = None
    negative_crops_coords_top_left: tuple[int, int] = (0, 0)
    negative_target_size: tuple[int, int] | None = None


class JobRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One denoising job. ``seeds`` has one entry for all pictures together, or one for each."""

    id: str
    task: Task = "text-to-image"
    height: int
    width: int
    num_inference_steps: int
    num_images_per_prompt: int = 1
    guidance_scale: float
    guidance_rescale: float = 0.0
    eta: float = 0.0
    strength: float = 1.0
    seeds: tuple[int, ...]
    scheduler: str | None = None
    scheduler_config: dict[str, Any] = {}
    adapters: tuple[AdapterUse, ...] = ()
    controls: tuple[ControlUse, ...] = ()
    guess_mode: bool = False
    """ControlNets act on the conditional branch only, and less on the finer residuals."""
    frames: int | None = None
    """Frames of each clip; None for pictures."""
    context: ContextWindow | None = None
    """Set for clips: a window for clips that are longer than it."""
    sizes: SizeConditions = SizeConditions()
    timeout: float | None = None
    """Seconds from arrival in the denoiser."""
    priority: int = 5
    """1 goes first, 9 last."""
    progress_every: int = 0
    """Steps between two progress answers; 0 for none."""
    preview: bool = False
    """Whether progress answers carry a small picture of each result."""


class Admission(msgspec.Struct, frozen=True, kw_only=True):
    """The question whether a job may come; if so, a place in the waiting line is kept for it."""

    id: str
    rows: int
    steps: int
    batch_key: str


def batch_key(
    bundle: Bundle, height: int, width: int, frames: int | None, context: ContextWindow | None, *, regions: bool
) -> str:
    """Equal for jobs whose rows can share a call of the UNet.

    Args:
        frames: of each clip; None for pictures.
        context: the window in which longer clips run.
        regions: whether an adapter has several masked images. Engines that are built for ranges of shapes have a
            profile of their own for these, which long lists of pictures do not fit.
    """
    sizes = [height, width]
    if frames is not None:
        sizes.insert(0, frames if context is None else min(frames, context.length))
    apart = regions and BACKENDS[bundle.backend].compiled
    return "x".join(map(str, sizes)) + (" regions" if apart else "")
