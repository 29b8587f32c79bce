"""How long an engine takes, as a simulation needs it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import numpy as np

from imprompt_bench.fleet.traffic import GUIDANCE_BRANCHES
from imprompt_bench.results import BenchError, Measurement, Run


class Engine(NamedTuple):
    """Seconds on one server, for a picture of the usual size. The time of a row grows with the number of pixels."""

    call: float
    """For each UNet call, however many rows it has."""
    row: float
    """For each row of a call."""
    picture: float = 0.0
    """For each picture or frame after its last step: the VAE."""
    request: float = 0.0
    """For each request outside the denoiser; requests do not wait for each other here."""


SD15_H200 = Engine(call=0.0034, row=0.00213)
"""SD 1.5 at 512 x 512 in fp16 on an H200, without encoders and VAE: a UNet call took 7.7 ms with 2 rows, and 37.5 ms
with 16. `CALL_OVERHEAD` of the denoiser's policy comes from the same calls."""


def measured(run: Run) -> Engine:
    """Fit an engine to the scenario `growth` of a run of `imprompt bench`.

    Raises:
        BenchError: the run lacks it.
    """
    grown = run.of("growth")
    by_steps = [point for point in grown if point.label == "steps"]
    by_pictures = [point for point in grown if point.label == "pictures"]
    if min(len(by_steps), len(by_pictures)) < 2:
        raise BenchError("needs a result with the scenario growth: imprompt bench --scenario growth")
    alone = by_pictures[0]
    usual_call = _slope(by_steps, "denoise")
    calls = _typical(alone, "denoise") / usual_call
    row = _slope(by_pictures, "denoise") / GUIDANCE_BRANCHES / calls
    return Engine(
        call=max(usual_call - GUIDANCE_BRANCHES * row, 0.0),
        row=row,
        picture=_slope(by_pictures, "vae_decoder"),
        request=_typical(alone, "total") - _typical(alone, "denoise") - _typical(alone, "vae_decoder"),
    )


def _slope(points: Sequence[Measurement], stage: str) -> float:
    """Fit a line to the seconds of a stage, by the value that grows."""
    values = [point.value or 0.0 for point in points]
    return float(np.polyfit(values, [_typical(point, stage) for point in points], 1)[0])


def _typical(point: Measurement, stage: str) -> float:
    return median(sample.timings.get(stage, 0.0) for sample in point.samples)
