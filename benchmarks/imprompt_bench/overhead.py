"""`imprompt bench overhead`: measure what a tick of the denoiser costs in addition to the engine.

The UNet is an engine that does nothing. The jobs are guided 512 x 512 pictures with an image prompt, and all of them
share every call.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from imprompt_bench.results import environment
from imprompt_bench.rig import Rig, sd15
from imprompt_serving.denoiser.meter import Meter

JOBS = (1, 4, 16)
SCHEDULERS = ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
STEPS, SIZE = 50, 512


class NullEngine:
    """Returns the same noise immediately, once all jobs have been submitted."""

    def __init__(self, rows: int) -> None:
        generator = np.random.default_rng(0)
        self._noise = generator.standard_normal((rows, 4, SIZE // 8, SIZE // 8)).astype(np.float32)
        self.all_submitted = threading.Event()
        self.rows: list[int] = []

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.all_submitted.wait()
        self.rows.append(len(tensors["sample"]))
        return {"noise_pred": self._noise[: self.rows[-1]]}


class _TickTimes(Meter):
    def __init__(self) -> None:
        self.ticks: list[tuple[int, float]] = []

    def ticked(self, rows: int, seconds: float) -> None:
        self.ticks.append((rows, seconds))


def measure(jobs: int, scheduler: str) -> dict[str, Any]:
    """Measure the seconds of ticks that all `jobs` share."""
    engine, meter = NullEngine(2 * jobs), _TickTimes()
    rig = Rig(sd15(rows=2 * jobs, adapters=("plain",)), engine, meter)
    made = [rig.job(f"{i}", steps=STEPS, size=SIZE, seed=i, scheduler=scheduler) for i in range(jobs)]
    waits = [rig.submit(job) for job in made]
    began = time.perf_counter()
    engine.all_submitted.set()
    for wait in waits:
        wait()
    wall = time.perf_counter() - began
    rig.denoiser.stop()
    # Skip the first ticks, in which jobs still join and the engine waits for them.
    full = [seconds for rows, seconds in meter.ticks if rows == 2 * jobs][2:]
    return {
        "jobs": jobs,
        "scheduler": scheduler,
        "ticks": len(full),
        "median_ms": round(statistics.median(full) * 1e3, 3),
        "fastest_ms": round(min(full) * 1e3, 3),
        "wall_ms_per_tick": round(wall / len(meter.ticks) * 1e3, 3),
    }


def measure_all(output: Path) -> None:
    """Measure every number of jobs with every scheduler; print a table and write the results to `output`."""
    torch.set_num_threads(1)  # as in the denoiser
    measure(1, SCHEDULERS[0])  # warm-up
    results = [measure(jobs, scheduler) for jobs in JOBS for scheduler in SCHEDULERS]
    print(f"{'jobs':>4}  {'scheduler':<28} {'median ms':>10} {'fastest ms':>11}")
    for row in results:
        print(f"{row['jobs']:>4}  {row['scheduler']:<28} {row['median_ms']:>10} {row['fastest_ms']:>11}")
    kept = {"environment": environment(), "steps": STEPS, "size": SIZE, "overhead_per_tick": results}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(kept, indent=2) + "\n")
