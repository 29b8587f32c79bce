"""Load the engines of a denoiser and put its parts together."""

from __future__ import annotations

from collections.abc import Callable

import torch

from imprompt_serving.backends import Engine
from imprompt_serving.backends.padding import PaddedEngine
from imprompt_serving.denoiser.conditioning import CPU, Conditioner
from imprompt_serving.denoiser.networks import StepNetworks
from imprompt_serving.specs import Bundle, CallRows


def assemble(
    bundle: Bundle, engine: Callable[[str], Engine], device: torch.device = CPU, call_rows: CallRows | None = None
) -> tuple[Conditioner, StepNetworks]:
    """Build what runs once per request, and what runs at every step, on `device`.

    Args:
        engine: loads the engine of a name.
        call_rows: the numbers of rows that engines run; by default any, up to the bundle's limit.
    """
    controlnets, t2i_adapters = bundle.controlnets, bundle.t2i_adapters
    call_rows = call_rows or bundle.shapes.call_rows()

    def padded(name: str, most: int = call_rows.most) -> Engine:
        return PaddedEngine(engine(name), call_rows._replace(most=most))

    conditioner = Conditioner(
        bundle,
        {adapter.name: padded(f"image_projection_{adapter.name}", bundle.max_images) for adapter in bundle.adapters},
        {net.name: padded(f"controlnet_embedding_{net.name}") for net in controlnets},
        {adapter.name: padded(f"t2i_adapter_{adapter.name}") for adapter in t2i_adapters},
        device,
    )
    unets = {name: engine(name) for name in ("unet", "motion_unet")[: 1 if bundle.motion is None else 2]}
    controls = {net.name: engine(f"controlnet_{net.name}") for net in controlnets}
    return conditioner, StepNetworks(bundle, unets, controls, call_rows)
