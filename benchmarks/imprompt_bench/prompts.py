"""`imprompt bench prompts`: measure what long prompts cost, with the engines of an exported bundle.

Engines run in this process on one thread, so that CPU time is their work alone. Lengths take turns, so that other load
on the machine affects all of them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from imprompt_bench.results import BenchError
from imprompt_serving.backends import Engine, get_backend
from imprompt_serving.denoiser.assembly import assemble
from imprompt_serving.denoiser.batch import Batcher, RowSlice
from imprompt_serving.denoiser.job import Job
from imprompt_serving.families import get_family
from imprompt_serving.job_request import JobRequest
from imprompt_serving.parameters import Settings
from imprompt_serving.specs import Bundle
from imprompt_serving.tensor_names import NEGATIVE

CHUNKS = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """CPU seconds for prompts of one length, in each round: of the text encoders, and of a step of the UNet."""

    chunks: int
    text: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)


def measure(repository: Path, model: str, *, size: int | None = None, rounds: int = 9) -> list[Cost]:
    """Measure prompts of 1, 2, 4, and 8 chunks, for a guided picture of `size` pixels without image prompts.

    Raises:
        BenchError: the bundle is not in `repository`, or cannot start from noise.
    """
    folder = repository / model / "1"
    if not folder.is_dir():
        raise BenchError(f"no bundle {model} in {repository}")
    bundle = Bundle.load(folder)
    if bundle.plain_task != "text-to-image":
        raise BenchError(f"{model} cannot start from noise")
    torch.set_num_threads(1)
    load = partial(get_backend(bundle.backend).load, threads=1)
    texts = [load(repository / bundle.model(encoder.engine) / "1" / "model.onnx") for encoder in bundle.text_encoders]
    costs = [Cost(chunks=count) for count in CHUNKS if count <= bundle.shapes.prompt_chunks]
    steps = _steps(bundle, repository, [cost.chunks for cost in costs], size or bundle.default_height)
    for index in range(rounds + 1):  # the first one warms up
        for cost, step in zip(costs, steps, strict=True):
            seconds = _cpu_seconds(partial(_encode, bundle, texts, cost.chunks)), _cpu_seconds(step)
            if index:
                cost.text.append(seconds[0])
                cost.step.append(seconds[1])
    return costs


def _encode(bundle: Bundle, engines: list[Engine], chunks: int) -> None:
    """Encode each chunk in a call of its own, as the server does for one request."""
    for encoder, engine in zip(bundle.text_encoders, engines, strict=True):
        ids = np.ones((1, encoder.max_length), np.int64)
        for _ in range(chunks):
            engine.run({"input_ids": ids, "clip_skip": np.zeros((1, 1), np.int64)})


def _steps(bundle: Bundle, repository: Path, lengths: list[int], size: int) -> list[Callable[[], object]]:
    """Return, for each number of chunks, a function that runs the networks of one step."""
    denoiser = repository / next(iter(bundle.denoisers)) / "1"
    backend = get_backend(bundle.backend)
    conditioner, networks = assemble(bundle, lambda name: backend.load(denoiser / f"{name}.onnx", threads=1))
    settings = Settings.with_defaults(height=size, width=size, guidance_scale=7.5, strength=1.0)
    request, batcher = JobRequest(id="prompts", settings=settings, seeds=(0,)), Batcher(bundle)
    shapes = get_family(bundle.family).text_shapes(bundle)
    found: list[Callable[[], object]] = []
    for chunks in lengths:
        tensors: dict[str, torch.Tensor] = {}
        for name, (first, *rest) in shapes.items():
            value = torch.randn(1, first * chunks if rest else first, *rest)
            tensors |= {name: value, NEGATIVE + name: value}
        job = Job(request, bundle, conditioner(request, tensors), tensors)
        parts = [RowSlice(job, 0, job.rows)]
        found.append(partial(networks, parts, batcher.inputs(parts)))
    return found


def _cpu_seconds(call: Callable[[], object]) -> float:
    began = time.process_time()
    with torch.no_grad():
        call()
    return time.process_time() - began


def table(costs: list[Cost]) -> str:
    """Format the medians, and each step relative to that of the shortest prompt in the same round."""
    lines = [f"{'chunks':>6}  {'text encoders, ms':>18}  {'UNet step, ms':>14}  {'relative':>8}"]
    for cost in costs:
        text, step = (statistics.median(values) * 1e3 for values in (cost.text, cost.step))
        ratio = statistics.median(own / first for own, first in zip(cost.step, costs[0].step, strict=True))
        lines.append(f"{cost.chunks:>6}  {text:>18.1f}  {step:>14.1f}  {ratio:>8.2f}")
    return "\n".join(lines)
