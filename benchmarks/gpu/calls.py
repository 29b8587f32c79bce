"""Stages `parity` and `unet`: single calls of the UNet and the VAE."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from gpu.networks import roof
from gpu.plan import Options
from gpu.record import measurement
from gpu.systems import System
from gpu.timing import device_seconds
from imprompt_bench.results import Measurement


def parity(system: System, options: Options) -> Iterator[Measurement]:
    """Differences from float32, of the noise for the fewest rows and of a decoded picture."""
    assert system.expected is not None  # engines have it
    rows = min(system.inputs)
    answer = system.unet(system.inputs[rows]).float()
    notes = difference(answer, system.expected)
    yield measurement("parity", f"UNet, {system.label}", value=rows, notes=notes)
    for precision, decode in system.decoders.items():
        assert system.expected_pictures is not None
        latents = torch.randn(*_latents(system), generator=torch.Generator().manual_seed(0)).to(options.device)
        levels = (decode({"latents": latents}).float() - system.expected_pictures.float()).abs()
        notes = {"levels_max": float(levels.max()), "levels_mean": float(levels.mean())}
        yield measurement("parity", f"VAE, {precision}", notes=notes)


def difference(answer: Tensor, expected: Tensor) -> dict[str, float]:
    """Differences as shares of the largest value, and the cosine."""
    apart, largest = (answer - expected).abs(), expected.abs().max()
    cosine = torch.nn.functional.cosine_similarity(answer.flatten(), expected.flatten(), dim=0)
    return {"max": float(apart.max() / largest), "mean": float(apart.mean() / largest), "cosine": float(cosine)}


def unet(system: System, options: Options) -> Iterator[Measurement]:
    """Seconds of a UNet call on the device by its rows, next to what a matrix product reaches at the same time."""
    limit = roof(options.device, system.dtype)
    for rows, tensors in system.inputs.items():
        seconds = device_seconds(partial(system.unet, tensors), options.device, options.repeats)
        rate = system.flop[rows] / sorted(seconds)[len(seconds) // 2]
        yield measurement(
            "unet",
            system.label,
            seconds,
            value=rows,
            notes={
                "tflop": system.flop[rows] / 1e12,
                "tflop_per_s": rate / 1e12,
                "share_of_roof": rate / limit,
            },
        )


def _latents(system: System) -> tuple[int, ...]:
    side = system.networks.size // 8
    return 1, 4, side, side
