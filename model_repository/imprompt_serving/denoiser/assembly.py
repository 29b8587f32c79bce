"""The parts of a denoiser, with their engines loaded."""

from __future__ import annotations

from collections.abc import Callable

import torch

from imprompt_serving.denoiser.conditioning import CPU, Conditioner
from imprompt_serving.denoiser.networks import StepNetworks
from imprompt_serving.engines import Engine
from imprompt_serving.specs import Bundle


def assemble(
    bundle: Bundle, engine: Callable[[str], Engine], device: torch.device = CPU
) -> tuple[Conditioner, StepNetworks]:
    """What runs once a request, and what runs at each step, on ``device``; ``engine`` gives the engine of a name."""
    controlnets, t2i_adapters = bundle.controlnets, bundle.t2i_adapters
    conditioner = Conditioner(
        bundle,
        {adapter.name: engine(f"image_projection_{adapter.name}") for adapter in bundle.adapters},
        {net.name: engine(f"controlnet_embedding_{net.name}") for net in controlnets},
        {adapter.name: engine(f"t2i_adapter_{adapter.name}") for adapter in t2i_adapters},
        device,
    )
    unets = {name: engine(name) for name in ("unet", "motion_unet")[: 1 if bundle.motion is None else 2]}
    return conditioner, StepNetworks(bundle, unets, {net.name: engine(f"controlnet_{net.name}") for net in controlnets})
