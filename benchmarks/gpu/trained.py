"""Stage `parity` of the embedded bundle: the device against float32 on the CPU, by scheduler, in latents and levels."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpu.plan import Options, Task
from gpu.record import measurement
from gpu.timing import torch_device
from imprompt_bench.results import BenchError, Measurement
from imprompt_bench.workload import reference
from imprompt_demo import bundle_path
from imprompt_export import graphs
from imprompt_export.backends.inductor import Packager, started_workers
from imprompt_export.bundle import BundleFile
from imprompt_export.checkpoints import Checkpoints, load
from imprompt_export.exporter import describe
from imprompt_export.fp16_vae import fit_fp16_range
from imprompt_export.graphs import Graph
from imprompt_export.precision import Positional
from imprompt_serving import tensor_names
from imprompt_serving.backends import get_backend
from imprompt_serving.capabilities import SCHEDULERS
from imprompt_serving.denoiser.answers import Outcome
from imprompt_serving.denoiser.batch import Batcher
from imprompt_serving.denoiser.conditioning import CPU, Conditioner
from imprompt_serving.denoiser.job import Job
from imprompt_serving.denoiser.loop import Denoiser
from imprompt_serving.denoiser.networks import StepNetworks
from imprompt_serving.gpu import record_launch
from imprompt_serving.job_request import AdapterOptions, JobRequest
from imprompt_serving.parameters import Settings
from imprompt_serving.pipeline.images import clip_pixels
from imprompt_serving.specs import Bundle

ADAPTER, PROMPT, SEED = "plus", "a star", 1
SCALE, GUIDANCE = 0.6, 5.0
BUNDLE = """\
name = "world"
base = "{base}"

[[ip_adapter]]
name = "{adapter}"
path = "{base}/../ip-adapter"
subfolder = "models"
weight_name = "ip-adapter-plus_world.safetensors"

[shapes]
height = [{size}, {size}, {size}]
width = [{size}, {size}, {size}]
rows = [1, 2, 2]
regions = 1
"""
SIZE = 64
"""The smaller of the two sizes of the embedded bundle."""


class GraphEngine:
    """A graph that PyTorch runs in float32 on the CPU."""

    def __init__(self, graph: Graph) -> None:
        self._graph, self._module = graph, Positional(graph).eval()

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        answer = self.run_tensors({name: torch.from_numpy(value) for name, value in tensors.items()})
        return {name: value.numpy() for name, value in answer.items()}

    def run_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            answer = self._module(*(tensors[spec.name] for spec in self._graph.inputs))
        return dict(zip(self._graph.outputs, answer, strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """Engines on one device."""

    unet: Any
    decoder: Any
    device: torch.device


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """The bundle with its engines twice, and the embeddings of one request."""

    label: str
    bundle: Bundle
    projection: GraphEngine
    tensors: dict[str, Tensor]
    cpu: Side
    device: Side
    steps: int


def prepare(task: Task, options: Options) -> Trained:
    """Load the embedded bundle, build its engines for the device, and keep PyTorch's networks for the CPU."""
    work = Path(options.work, task.name)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    base = bundle_path() / "checkpoints" / "base"
    (work / "bundle.toml").write_text(BUNDLE.format(base=base, adapter=ADAPTER, size=SIZE))
    file = BundleFile.load(work / "bundle.toml")
    checkpoints = load(file)
    bundle = describe(file, checkpoints)
    tensors = _embeddings(bundle, checkpoints)
    (adapter,) = checkpoints.adapters
    projection = GraphEngine(graphs.image_projection(ADAPTER, adapter.projection, adapter.embeds))
    pipeline = checkpoints.pipeline
    fit_fp16_range(pipeline.vae)
    decoder, unet = graphs.vae_decoder(pipeline.vae, graphs.FP16_FOR_BF16), graphs.unet(pipeline.unet, [ADAPTER])
    device = _engines(task, options, bundle, unet, decoder)
    return Trained(
        label=task.precision,
        bundle=bundle,
        projection=projection,
        tensors=tensors,
        cpu=Side(unet=GraphEngine(unet), decoder=GraphEngine(decoder), device=CPU),
        device=device,
        steps=options.steps,
    )


def _engines(task: Task, options: Options, bundle: Bundle, unet: Graph, decoder: Graph) -> Side:
    """AOTInductor's packages for the device."""
    # Quantized bundles have their VAE in half precision.
    precisions = {"unet": task.precision, "vae": task.precision if task.precision != "fp8" else "fp16"}
    work, device = Path(options.work, task.name), torch_device(options.device)
    with started_workers() as workers:
        waits = {}
        for name, graph in (("unet", unet), ("vae", decoder)):
            packager = Packager(precisions[name], workers, exact=options.device == "cuda")
            waits[name] = packager.start(graph, work / name / graph.name, bundle)
        files = {name: wait().file for name, wait in waits.items()}
    load_engine = partial(get_backend("inductor").load, device="" if device == CPU else str(device))
    return Side(unet=load_engine(files["unet"]), decoder=load_engine(files["vae"]), device=device)


def _embeddings(bundle: Bundle, checkpoints: Checkpoints) -> dict[str, Tensor]:
    """What the encoders make of a prompt and of a picture."""
    (encoder,) = checkpoints.image_encoders.values()
    pixels = torch.from_numpy(clip_pixels(reference(SEED), bundle.image_encoders[0]))[None]
    tensors = {}
    with torch.no_grad():
        conditional, unconditional = checkpoints.pipeline.encode_prompt(PROMPT, "cpu", 1, True, "")
        for prefix, text, image in ((tensor_names.NEGATIVE, unconditional, 0 * pixels), ("", conditional, pixels)):
            tensors[f"{prefix}prompt_embeds"] = text
            states = encoder(image, output_hidden_states=True).hidden_states[-2]
            tensors[prefix + tensor_names.image_embeds(ADAPTER)] = states
    return tensors


def parity(found: Trained, options: Options) -> Iterator[Measurement]:
    """The largest difference of the latents by scheduler, and of the pictures in levels of 255.

    Raises:
        BenchError: names the schedulers that failed, after the others.
    """
    failed = []
    for scheduler in SCHEDULERS:
        try:
            yield measurement("parity", f"{found.label}, {scheduler}", notes=_difference(found, scheduler))
        except Exception as error:
            failed.append(f"{scheduler}: {error}")
    if failed:
        raise BenchError("; ".join(failed))


def _difference(found: Trained, scheduler: str) -> dict[str, float]:
    latents = [_denoise(found, side, scheduler) for side in (found.cpu, found.device)]
    expected, answer = latents
    pictures = [_decode(side, of) for side, of in zip((found.cpu, found.device), latents, strict=True)]
    levels = (pictures[1].float() - pictures[0].float()).abs()
    return {
        "latents_max": float((answer - expected).abs().max()),
        "latents_largest": float(expected.abs().max()),
        "levels_max": float(levels.max()),
        "levels_mean": float(levels.mean()),
    }


def _denoise(found: Trained, side: Side, scheduler: str) -> Tensor:
    """The latents of one guided picture with an image prompt, on the host."""
    bundle, device = found.bundle, side.device
    call_rows = bundle.shapes.call_rows(bucketed=device.type == "cuda")
    settings = Settings.with_defaults(
        height=SIZE,
        width=SIZE,
        num_inference_steps=found.steps,
        guidance_scale=GUIDANCE,
        strength=1.0,
        scheduler=scheduler,
    )
    use = AdapterOptions(name=ADAPTER, scale=SCALE)
    request = JobRequest(id="parity", settings=settings, seeds=(SEED,), adapters=(use,))
    conditioner = Conditioner(bundle, {ADAPTER: found.projection}, device=device)
    networks = StepNetworks(bundle, {"unet": side.unet}, {}, call_rows)
    denoiser = Denoiser(networks, Batcher(bundle, call_rows), call_rows, record_launch=partial(record_launch, device))
    try:
        with torch.no_grad():
            job = Job(request, bundle, conditioner(request, found.tensors), found.tensors, device)
        outcome = Outcome()
        denoiser.submit(job, outcome)
        outcome.ended.wait()
        if outcome.error:
            raise outcome.error
        return job.result()
    finally:
        denoiser.stop()


def _decode(side: Side, latents: Tensor) -> Tensor:
    pictures: Tensor = side.decoder.run_tensors({"latents": latents.to(side.device)})["images"]
    return pictures.cpu()
