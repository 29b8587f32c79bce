"""Stage `picture`: one picture of all its steps, and the VAE alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor

from gpu.plan import Options
from gpu.record import measurement
from gpu.systems import Run, System
from gpu.timing import device_seconds, fewer, torch_device, wall_seconds
from imprompt_bench.checkpoints import SCHEDULER
from imprompt_bench.results import Measurement
from imprompt_bench.rig import Rig

GUIDANCE = 7.5


def picture(system: System, options: Options) -> Iterator[Measurement]:
    """Wall seconds of one guided picture, decoded: of imprompt in its own denoiser, of others in a plain loop."""
    device, repeats = options.device, fewer(options.repeats)
    latents = torch.randn(1, 4, *(system.networks.size // 8,) * 2, generator=torch.Generator().manual_seed(0))
    there = {"latents": latents.to(device)}
    for precision, decode in system.decoders.items():
        seconds = device_seconds(partial(decode, there), device, repeats)
        yield measurement("picture", f"{system.label}: VAE {precision} alone", seconds)
    rig = None
    if system.bundle is not None:
        rig = Rig(system.bundle, system.engine, bucketed=device == "cuda", device=torch_device(device))
    try:
        for precision, decode in system.decoders.items():
            call: Callable[[], object]
            if rig is None:
                call = partial(plain_loop, system.unet, decode, system.inputs[2], options.steps)
            else:
                call = partial(_own_loop, rig, decode, options)
            seconds = wall_seconds(call, device, repeats)
            label = f"{system.label}: {options.steps} steps, VAE {precision}"
            yield measurement("picture", label, seconds, value=1)
    finally:
        if rig is not None:
            rig.denoiser.stop()


def _own_loop(rig: Rig, decode: Run, options: Options) -> Tensor:
    """As in the server: latents cross the host between the denoiser and the VAE."""
    job = rig.job("picture", steps=options.steps, size=rig.bundle.default_height)
    return decode({"latents": rig.submit(job)().to(options.device)}).cpu()


def plain_loop(unet: Run, decode: Run, tensors: Mapping[str, Tensor], steps: int) -> Tensor:
    """Guided Euler steps as in diffusers' pipelines, without their checks and progress bar."""
    scheduler = EulerDiscreteScheduler(**SCHEDULER)
    scheduler.set_timesteps(steps, device=tensors["sample"].device)
    latents = tensors["sample"][: len(tensors["sample"]) // 2] * float(scheduler.init_noise_sigma)
    for timestep in scheduler.timesteps:
        sample = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
        # Not expanded: compiled code reads its inputs as if they were contiguous.
        given = {**tensors, "sample": sample, "timestep": timestep.to(sample).repeat(len(sample))}
        unconditional, conditional = unet(given).chunk(2)
        latents = scheduler.step(unconditional + GUIDANCE * (conditional - unconditional), timestep, latents)[0]
    return decode({"latents": latents}).cpu()
