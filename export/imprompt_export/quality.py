"""Measure the loss of quality of quantized networks against fp32, in their predictions and in a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from imprompt_export.calibration import GUIDANCE_SCALE, Arrays
from imprompt_export.parity import ParityError
from imprompt_serving.specs import Bundle


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    """Quality of a quantized engine against fp32, over the steps of a run that calibration did not see.

    `snr_db` is the power of the network's prediction over the power of the error, for the same inputs; for a UNet with
    guidance, of the guided prediction. `worst_snr_db` is that of the worst call. `picture_distance` compares the final
    pictures, each from a complete run: mean difference in levels of 255.
    """

    engine: str
    precision: str
    calls: int
    snr_db: float
    worst_snr_db: float
    min_snr_db: float
    picture_distance: float


class QualityError(ParityError):
    """The predictions of a quantized engine differ too much from fp32."""


def quantized_networks(bundle: Bundle) -> tuple[str, ...]:
    """List the graphs to quantize: the UNet and ControlNets for pictures.

    The others run once per request, or are for clips, which are not quantized.
    """
    return ("unet", *(f"controlnet_{net.name}" for net in bundle.controlnets))


def check_quality(rows: Sequence[Quality]) -> None:
    """Raise for the first network whose quality is below the bundle's `engine.min_snr_db`.

    Raises:
        QualityError: names the network and its signal-to-noise ratio.
    """
    for row in rows:
        if not row.snr_db >= row.min_snr_db:
            raise QualityError(
                f"{row.engine} in {row.precision}: its predictions have a signal-to-noise ratio of {row.snr_db:.1f} dB "
                f"against fp32, but engine.min_snr_db is {row.min_snr_db:g}"
            )


def measure(
    name: str, precision: str, references: Sequence[Arrays], answers: Sequence[Arrays], limit: float, distance: float
) -> Quality:
    """Compare the `answers` of network `name` with `references`, the answers of fp32 to the same calls."""
    powers = []
    for reference, answer in zip(references, answers, strict=True):
        pairs: list[tuple[Any, Any]] = [(reference[key], answer[key].astype(np.float32)) for key in reference]
        if name == "unet" and len(pairs[0][0]) == 2:  # both branches
            pairs = [(_guided(exact), _guided(rounded)) for exact, rounded in pairs]
        powers.append((sum(float((e**2).sum()) for e, _ in pairs), sum(float(((e - r) ** 2).sum()) for e, r in pairs)))
    signal, noise = map(sum, zip(*powers, strict=True))
    return Quality(
        engine=name,
        precision=precision,
        calls=len(powers),
        snr_db=_db(signal, noise),
        worst_snr_db=min(_db(*step) for step in powers),
        min_snr_db=limit,
        picture_distance=distance,
    )


def picture_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Return the mean difference of two uint8 pictures, in levels of 255."""
    return float(np.abs(one.astype(int) - other).mean())


def _guided(prediction: np.ndarray) -> np.ndarray:
    unconditional, conditional = np.split(prediction, 2)
    return np.asarray(unconditional + GUIDANCE_SCALE * (conditional - unconditional))


def _db(signal: float, noise: float) -> float:
    return 10 * math.log10(signal / noise) if noise else math.inf
