"""Prepare the systems to compare: AOTInductor packages, diffusers as is and compiled, and ONNX Runtime."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu.networks import Networks, Tensors, positional, run_diffusers, unet_flop
from gpu.plan import Options, Task
from imprompt_bench.presets import PRESETS
from imprompt_export import graphs
from imprompt_export.backends import BuiltEngine
from imprompt_export.backends.inductor import Packager, started_workers
from imprompt_export.fp16_vae import fit_fp16_range
from imprompt_export.graphs import Graph
from imprompt_serving.backends import EngineError, get_backend
from imprompt_serving.specs import Bundle

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Run = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(kw_only=True)
class System:
    """A UNet and decoders, ready to run."""

    label: str
    networks: Networks
    dtype: torch.dtype
    """The type of its matrix products; float16 for quantized ones, to compare both with the same roof."""
    inputs: dict[int, Tensors]
    """Inputs of the UNet on the device, by their rows."""
    unet: Run
    decoders: dict[str, Run] = field(default_factory=dict)
    """Latents -> pictures, by precision; the first is the default."""
    engine: Any = None
    """The UNet for the denoiser, if the stages run its loop."""
    bundle: Bundle | None = None
    flop: dict[int, float] = field(default_factory=dict)
    """Floating-point operations of a UNet call, by rows."""
    expected: Tensor | None = None
    """The noise predicted in float32, for the smallest number of rows."""
    expected_pictures: Tensor | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    """Parts that could not be built, with the reason."""
    setup: dict[str, Any] = field(default_factory=dict)


def inductor(task: Task, options: Options) -> System:
    """Build AOTInductor packages in parallel, and load them as a server does."""
    began, device, work = time.perf_counter(), options.device, Path(options.work, task.name)
    shutil.rmtree(work, ignore_errors=True)  # of this task before it was started again
    networks = Networks(PRESETS[task.preset], device)
    inputs = {rows: networks.inputs(rows) for rows in task.rows}
    bundle = networks.bundle(max(task.rows), task.precision)
    # Before anything is traced, which leaves tensors without data behind.
    flop = {rows: unet_flop(networks.preset, rows) for rows in task.rows}
    graph = networks.graph()
    (expected,) = positional(graph, inputs[task.rows[0]])
    latents = torch.randn(1, 4, networks.size // 8, networks.size // 8, generator=torch.Generator().manual_seed(0))
    waits: dict[str, Callable[[], BuiltEngine]] = {}
    skipped: dict[str, str] = {}
    decoders: dict[str, Run] = {}
    found = System(
        label=f"inductor {task.precision}",
        networks=networks,
        dtype=DTYPES.get(task.precision, torch.float16),
        inputs=inputs,
        unet=lambda _: _missing("unet"),
        bundle=bundle,
        flop=flop,
        expected=expected,
        skipped=skipped,
        decoders=decoders,
    )
    with started_workers() as workers:

        def start(name: str, graph: Graph, precision: str) -> None:
            packager = Packager(precision, workers, exact=device == "cuda")
            # One after the other: tracing takes one core, and packages are built by other processes meanwhile.
            waits[name] = packager.start(graph, work / name / graph.name, bundle)

        start("unet", graph, task.precision)
        networks.unet.to("meta")  # the engine has its own copy
        if task.precision in DTYPES and set(task.stages) != {"unet"}:  # bundles with quantized UNets have the same VAE
            fitted = fit_fp16_range(networks.vae)
            decoder = graphs.vae_decoder(networks.vae, graphs.AS_ENGINE)
            with torch.no_grad():
                found.expected_pictures = _decode_reference(decoder, latents, device)
            for precision in dict.fromkeys((task.precision if fitted else "fp32", "fp32")):
                try:
                    start(f"vae-{precision}", decoder, precision)
                except Exception as error:
                    skipped[f"vae {precision}"] = f"{type(error).__name__}: {error}"
        made: dict[str, BuiltEngine] = {}
        for name, wait in waits.items():
            try:
                made[name] = wait()
            except EngineError as error:
                if name == "unet":
                    raise
                skipped[name] = str(error)
    found.setup = {
        f"{task.name} {name}": {
            "build_s": round(each.seconds, 1),
            "built": each.packages_built,
            "cached": each.packages_reused,
        }
        for name, each in made.items()
    }
    _free()
    backend, loaded_on = get_backend("inductor"), "cuda:0" if device == "cuda" else ""
    found.engine = backend.load(made["unet"].file, device=loaded_on)
    found.unet = lambda tensors: found.engine.run_tensors(tensors)["noise_pred"]
    for name, each in made.items():
        if name != "unet":
            vae: Any = backend.load(each.file, device=loaded_on)
            decoders[name.removeprefix("vae-")] = _decoder(vae)
    for rows in task.rows:
        found.unet(inputs[rows])  # the first call captures a CUDA graph
    for decode in decoders.values():
        decode({"latents": latents.to(device)})
    found.setup[task.name] = {"ready_s": round(time.perf_counter() - began, 1)}
    return found


def _missing(what: str) -> Tensor:
    raise EngineError(f"{what} was not made")


def _decoder(engine: Any) -> Run:
    return lambda tensors: engine.run_tensors(tensors)["images"]


def _decode_reference(decoder: Graph, latents: Tensor, device: str) -> Tensor:
    decoder.module.to(device)
    pictures = positional(decoder, {"latents": latents.to(device)})[0]
    decoder.module.to("cpu")
    return pictures


def eager(task: Task, options: Options) -> System:
    """Load diffusers' networks without compiling them."""
    return _diffusers(task, options, "eager", lambda module: module)


def compiled(task: Task, options: Options) -> System:
    """Compile diffusers' UNet for one number of rows. The VAE, mostly convolutions, is not compiled."""

    def compile_unet(unet: Any) -> Any:
        return torch.compile(unet, mode="reduce-overhead", dynamic=False)

    return _diffusers(task, options, "torch.compile", compile_unet, channels_last=True)


def _diffusers(
    task: Task, options: Options, label: str, prepare: Callable[[Any], Any], *, channels_last: bool = False
) -> System:
    dtype, device = DTYPES[options.baseline_precision], options.device
    order = torch.channels_last if channels_last else torch.preserve_format
    networks = Networks(PRESETS[task.preset], device)
    flop = {rows: unet_flop(networks.preset, rows) for rows in task.rows}
    networks.unet.to(dtype).to(memory_format=order)
    inputs = {rows: networks.inputs(rows) for rows in task.rows}
    unet = prepare(networks.unet)
    # diffusers' pipelines run a VAE with `force_upcast` in float32.
    vae_dtype = torch.float32 if networks.vae.config.force_upcast and networks.preset.family == "sdxl" else dtype
    vae = networks.vae.to(device, vae_dtype).to(memory_format=order)

    def run_unet(tensors: Mapping[str, Tensor]) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            return run_diffusers(unet, dict(tensors), dtype)

    def decode(tensors: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            latents = (tensors["latents"] / vae.config.scaling_factor).to(vae_dtype)
            picture = vae.decode(latents, return_dict=False)[0].float()
            return ((picture * 0.5 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).to(torch.uint8)

    for rows in task.rows:
        for _ in range(3):  # compiles, then records a CUDA graph, then replays it
            run_unet(inputs[rows])
    found = System(
        label=f"{label} {options.baseline_precision}",
        networks=networks,
        dtype=dtype,
        inputs=inputs,
        unet=run_unet,
        decoders={str(vae_dtype).removeprefix("torch."): decode},
        flop=flop,
    )
    return found


def onnxruntime(task: Task, options: Options) -> System:
    """Export the same graph to ONNX, and load it with ONNX Runtime as a server does."""
    from imprompt_serving.backends.onnxruntime import check_cuda

    if options.device == "cuda":
        check_cuda()  # before the export, which takes long

    from imprompt_export.fused_attention import fuse_attention
    from imprompt_export.onnx_graph import export_onnx
    from imprompt_serving.gpu.onnxruntime import OnnxRuntimeDeviceEngine

    networks = Networks(PRESETS[task.preset], options.device)
    inputs = {rows: networks.inputs(rows) for rows in task.rows}
    flop = {rows: unet_flop(networks.preset, rows) for rows in task.rows}
    networks.unet.to("cpu")
    graph, precision = networks.graph(), options.baseline_precision
    file = Path(options.work, task.name, "unet", "unet.onnx")
    export_onnx(graph, file, DTYPES[precision])
    fuse_attention(file)
    networks.unet.to("meta")
    _free()
    engine = OnnxRuntimeDeviceEngine(file, options.device)
    found = System(
        label=f"onnxruntime {precision}",
        networks=networks,
        dtype=DTYPES[precision],
        inputs=inputs,
        unet=lambda tensors: engine.run_tensors(tensors)["noise_pred"],
        flop=flop,
    )
    for rows in task.rows:
        found.unet(inputs[rows])
    return found


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
