"""What the pipeline asks of the denoiser, beside tensors."""

from __future__ import annotations

from typing import Any

import msgspec

Scale = float | dict[str, Any] | list[float]


class AdapterUse(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter in one request; its embeddings travel as tensors."""

    name: str
    scale: Scale = 1.0


class JobRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One denoising job. ``seeds`` has one entry for all pictures together, or one for each."""

    id: str
    height: int
    width: int
    num_inference_steps: int
    num_images_per_prompt: int
    guidance_scale: float
    guidance_rescale: float
    eta: float
    seeds: tuple[int, ...]
    scheduler: str | None = None
    scheduler_config: dict[str, Any] = {}
    adapters: tuple[AdapterUse, ...] = ()
    timeout: float | None = None
    """Seconds from arrival in the denoiser."""
    progress_every: int = 0
    """Steps between two progress answers; 0 for none."""
