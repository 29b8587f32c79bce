"""Measure the loss of quality of quantized networks against fp32, in their outputs and in a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from imprompt_export.calibration import GUIDANCE_SCALE, Arrays, Calls
from imprompt_export.parity import ParityError
from imprompt_serving.backends import Engine
from imprompt_serving.specs import Bundle

_MIDDLE = 127.5
"""The level of a picture's value 0."""


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    """Quality of a quantized engine against fp32, over the calls of a run that calibration did not see.

    `snr_db` is the power of the network's output over the power of the error, for the same inputs: for a UNet with
    guidance, of the guided prediction; for pictures, of their values from -1 to 1; for an image encoder, of the worse
    one of its outputs. `worst_snr_db` is that of the worst call. `used` is false for a network that stays in fp32
    because it would fall below `min_snr_db`. `picture_distance` compares the final pictures, each from a complete run
    with all networks that are used: mean difference in levels of 255.
    """

    engine: str
    precision: str
    calls: int
    snr_db: float
    worst_snr_db: float
    min_snr_db: float
    used: bool = True
    picture_distance: float = math.nan


class Ratio(NamedTuple):
    """Signal-to-noise ratios in dB: over all calls, and in the worst one."""

    snr_db: float
    worst_snr_db: float


class QualityError(ParityError):
    """The predictions of a quantized engine differ too much from fp32."""


def step_networks(bundle: Bundle) -> tuple[str, ...]:
    """List the graphs of a denoising step that are quantized: the UNet and ControlNets for pictures, not for clips."""
    return ("unet", *(f"controlnet_{net.name}" for net in bundle.controlnets))


def check_quality(rows: Sequence[Quality]) -> None:
    """Raise for the first network in use whose quality is below its minimum.

    Raises:
        QualityError: names the network and its signal-to-noise ratio.
    """
    for row in rows:
        if row.used and not row.snr_db >= row.min_snr_db:
            raise QualityError(
                f"{row.engine} in {row.precision}: its predictions have a signal-to-noise ratio of {row.snr_db:.1f} dB "
                f"against fp32, but engine.min_snr_db is {row.min_snr_db:g}"
            )


def measure(name: str, precision: str, calls: Calls, engine: Engine, min_snr_db: float) -> Quality:
    """Compare `engine` with fp32 on the recorded `calls` of network `name`; no pictures are compared yet."""
    ratio = signal_to_noise(name, calls.outputs, [engine.run(tensors) for tensors in calls.inputs])
    return Quality(engine=name, precision=precision, calls=len(calls.inputs), min_snr_db=min_snr_db, **ratio._asdict())


def signal_to_noise(name: str, references: Sequence[Arrays], answers: Sequence[Arrays]) -> Ratio:
    """Compare the `answers` of network `name` with `references`, the answers of fp32 to the same calls."""
    calls = list(zip(references, answers, strict=True))
    outputs = [output for output, value in references[0].items() if value.dtype != bool]
    powers = [[_powers(name, exact[output], rounded[output]) for exact, rounded in calls] for output in outputs]
    if name.startswith("controlnet_"):  # all its residuals go into the same UNet
        powers = [[_total(call) for call in zip(*powers, strict=True)]]
    return Ratio(
        snr_db=min(_db(*_total(calls)) for calls in powers),
        worst_snr_db=min(_db(*call) for calls in powers for call in calls),
    )


def picture_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Return the mean difference of two uint8 pictures, in levels of 255."""
    return float(np.abs(one.astype(int) - other).mean())


def _powers(name: str, reference: np.ndarray, answer: np.ndarray) -> tuple[float, float]:
    """Return the powers of an output and of its error."""
    exact, rounded = reference.astype(np.float32), answer.astype(np.float32)
    if name == "unet" and len(exact) == 2:  # both branches
        exact, rounded = _guided(exact), _guided(rounded)
    elif reference.dtype == np.uint8:
        exact, rounded = exact - _MIDDLE, rounded - _MIDDLE
    return float((exact**2).sum()), float(((exact - rounded) ** 2).sum())


def _total(powers: Iterable[tuple[float, float]]) -> tuple[float, float]:
    signals, noises = zip(*powers, strict=True)
    return sum(signals), sum(noises)


def _guided(prediction: np.ndarray) -> np.ndarray:
    unconditional, conditional = np.split(prediction, 2)
    return np.asarray(unconditional + GUIDANCE_SCALE * (conditional - unconditional))


def _db(signal: float, noise: float) -> float:
    return 10 * math.log10(signal / noise) if noise else math.inf
