"""What a quantized network costs in quality: its predictions, and a picture, against those in fp32."""

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
    """A quantized network against fp32 over the steps of a run that calibration did not see.

    ``snr_db``: power of what the network predicts over the power of the difference, both for the same inputs; for a
    guided UNet that of the guided prediction. ``worst_snr_db``: of the call in which it is lowest.
    ``picture_distance``: of the final pictures, each from its own steps; mean difference in levels of 255.
    """

    engine: str
    precision: str
    calls: int
    snr_db: float
    worst_snr_db: float
    min_snr_db: float
    picture_distance: float


class QualityError(ParityError):
    """A quantized engine is too far from the network in fp32."""


def quantized_networks(bundle: Bundle) -> tuple[str, ...]:
    """Graphs that are quantized: UNet and ControlNets of pictures. Others run once a request, or (clips) stay exact."""
    return ("unet", *(f"controlnet_{net.name}" for net in bundle.controlnets))


def check_quality(rows: Sequence[Quality]) -> None:
    """Raise for the first network that is further from fp32 than the bundle allows."""
    for row in rows:
        if not row.snr_db >= row.min_snr_db:
            raise QualityError(
                f"{row.engine} in {row.precision}: its predictions have {row.snr_db:.1f} dB of signal to noise against "
                f"fp32, and engine.min_snr_db is {row.min_snr_db:g}"
            )


def measure(
    name: str, precision: str, references: Sequence[Arrays], answers: Sequence[Arrays], limit: float, distance: float
) -> Quality:
    """The quality of network `name` by its `answers` to the calls that fp32 answered with `references`."""
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
    """Mean difference of two uint8 pictures, in levels of 255."""
    return float(np.abs(one.astype(int) - other).mean())


def _guided(prediction: np.ndarray) -> np.ndarray:
    unconditional, conditional = np.split(prediction, 2)
    return np.asarray(unconditional + GUIDANCE_SCALE * (conditional - unconditional))


def _db(signal: float, noise: float) -> float:
    return 10 * math.log10(signal / noise) if noise else math.inf
