"""Pictures per second at 1 to 8 callers: `python -m imprompt_bench.callers [--output FILE]`.

A UNet of the width of SD 1.5 with random weights, made on the spot, at a small size: on a CPU, where a step of 512 x
512 takes a quarter of a minute, that still moves all the weights. Against the same requests one after the other, and
against diffusers' own loop (PyTorch, eager). Text encoder and VAE are left out. Takes some minutes and 12 GB of
memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from imprompt_bench.rig import SCHEDULER, WIDTH, Rig, save, sd15
from imprompt_export.graphs import unet as unet_graph
from imprompt_export.onnx_graph import export_onnx
from imprompt_serving.engines import Engine, load_engine

CALLERS = (1, 2, 4, 8)
PICTURES, STEPS, SIZE, GUIDANCE = 8, 4, 128, 7.5


class CountingEngine:
    """An engine that remembers the rows and seconds of its calls."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.rows: list[int] = []
        self.seconds: list[float] = []

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        began = time.perf_counter()
        answer = self._engine.run(tensors)
        self.seconds.append(time.perf_counter() - began)
        self.rows.append(len(tensors["sample"]))
        return answer


def measure(engine: Engine, callers: int) -> dict[str, Any]:
    """``callers`` threads ask for ``PICTURES`` in all, each for one after the other."""
    counting = CountingEngine(engine)
    rig = Rig(sd15(rows=16), counting)

    def ask(caller: int) -> list[float]:
        latencies = []
        for index in range(PICTURES // callers):
            began = time.perf_counter()
            rig.submit(rig.job(f"{caller}-{index}", steps=STEPS, size=SIZE, seed=caller * PICTURES + index))()
            latencies.append(time.perf_counter() - began)
        return latencies

    began = time.perf_counter()
    with ThreadPoolExecutor(callers) as pool:
        latencies = [seconds for each in pool.map(ask, range(callers)) for seconds in each]
    wall = time.perf_counter() - began
    rig.denoiser.stop()
    return {
        "callers": callers,
        "pictures_per_second": round(PICTURES / wall, 3),
        "median_latency_s": round(statistics.median(latencies), 2),
        "mean_rows_per_call": round(statistics.mean(counting.rows), 2),
        "share_outside_of_engine": round(1 - sum(counting.seconds) / wall, 4),
    }


def measure_diffusers(model: Any) -> dict[str, Any]:
    """The loop of diffusers' pipeline, a picture after the other, with the number of threads that is fastest here."""
    counts = range(1, (os.cpu_count() or 1) + 1)
    seconds = {count: min(_diffusers_seconds(model, count, pictures=1) for _ in range(2)) for count in counts}
    threads = min(seconds, key=seconds.__getitem__)
    pictures = PICTURES // 2
    seconds_each = _diffusers_seconds(model, threads, pictures=pictures) / pictures
    return {"threads": threads, "pictures_per_second": round(1 / min(seconds_each, seconds[threads]), 3)}


@torch.inference_mode()
def _diffusers_seconds(model: Any, threads: int, *, pictures: int) -> float:
    torch.set_num_threads(threads)
    scheduler = DDIMScheduler(**SCHEDULER, clip_sample=False)
    began = time.perf_counter()
    for seed in range(pictures):
        generator = torch.Generator().manual_seed(seed)
        text = torch.randn(2, 77, WIDTH, generator=generator)
        latents = torch.randn(1, 4, SIZE // 8, SIZE // 8, generator=generator)
        scheduler.set_timesteps(STEPS)
        for timestep in scheduler.timesteps:
            unconditional, conditional = model(torch.cat([latents] * 2), timestep, text).sample.chunk(2)
            noise = unconditional + GUIDANCE * (conditional - unconditional)
            latents = scheduler.step(noise, timestep, latents).prev_sample
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/callers.json"))
    output = parser.parse_args().output
    torch.manual_seed(0)
    model = UNet2DConditionModel(sample_size=64, cross_attention_dim=WIDTH).eval()
    result: dict[str, Any] = {"pictures": PICTURES, "steps": STEPS, "size": SIZE}
    result["diffusers_one_after_the_other"] = measure_diffusers(model)
    print("diffusers", result["diffusers_one_after_the_other"], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "unet", "model.onnx")
        began = time.perf_counter()
        export_onnx(unet_graph(model, []), file)
        print(f"exported in {time.perf_counter() - began:.0f} s", flush=True)
        del model
        torch.set_num_threads(1)  # as in the denoiser
        engine = load_engine(file, "onnxruntime")
        measure(engine, PICTURES)  # memory is laid out, and weights are packed, at first use
        result["callers"] = []
        for callers in CALLERS:
            # The better of two: what else the machine does only makes it slower.
            rounds = [measure(engine, callers) for _ in range(2)]
            result["callers"].append(max(rounds, key=lambda row: row["pictures_per_second"]))
            print(result["callers"][-1], flush=True)
            save(result, output)


if __name__ == "__main__":
    main()
