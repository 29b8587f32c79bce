"""UNet and VAE at full size on one GPU: engines of imprompt against diffusers, eager and compiled, in the same run.

    python benchmarks/gpu/bench.py --preset sd15 --preset sdxl -o gpu.json

Random weights, with an IP-Adapter plus. A picture is 20 guided Euler steps and the VAE; prompts are embeddings.
Callers are pictures that are made together, as the denoiser of the server does: two rows of the UNet for each.
Needs torch, diffusers, msgspec, and imprompt (installed, or this checkout); engines that are made from ONNX files need
onnx and onnxscript too. What an engine needs and does not find, it says, and is skipped. `--preset tiny --device cpu`
shows that all of it runs.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / room) for room in ("export", "model_repository", "client")]

import diffusers  # noqa: E402
import torch  # noqa: E402
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel  # noqa: E402
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0  # noqa: E402
from diffusers.models.embeddings import IPAdapterPlusImageProjection, MultiIPAdapterImageProjection  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from imprompt_export import graphs, image_prompt  # noqa: E402
from imprompt_export.fp16_vae import fit_fp16_range  # noqa: E402
from imprompt_export.graphs import Axes, Graph  # noqa: E402
from imprompt_export.image_prompt import AdapterPrompts  # noqa: E402
from imprompt_export.precision import Positional, cast, dtype_of  # noqa: E402
from imprompt_export.profiles import Profile  # noqa: E402
from imprompt_serving.backends import EngineError, get_backend  # noqa: E402
from imprompt_serving.gpu import DeviceEngine  # noqa: E402
from imprompt_serving.specs import level_size  # noqa: E402

Tensors = dict[str, Tensor]
Run = Callable[[Mapping[str, Tensor]], Tensor]
TOKENS, PATCHES, CLIP_WIDTH, STEPS, FACTOR = 16, 257, 1280, 20, 8
GUIDANCE, SCALE = 7.5, 0.6

_SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_TINY = {"block_out_channels": (32, 64), "attention_head_dim": 8, "cross_attention_dim": 64, "norm_num_groups": 8,
         "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "layers_per_block": 1,
         "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}  # fmt: skip
UNETS: dict[str, dict[str, Any]] = {"sd15": {"cross_attention_dim": 768}, "sdxl": _SDXL, "tiny": _TINY}
"""Arguments of ``UNet2DConditionModel``, whose defaults are those of SD 1.5 but for the width of the text."""
VAE_CHANNELS = {"sd15": (128, 256, 512, 512), "sdxl": (128, 256, 512, 512), "tiny": (16, 16, 16, 16)}


class Case:
    """The networks of a preset: as diffusers has them, and as the graphs that engines are made of."""

    def __init__(self, preset: str) -> None:
        torch.manual_seed(0)
        self.preset = preset
        self.diffusers = _unet(preset)
        self.vae = AutoencoderKL(
            block_out_channels=VAE_CHANNELS[preset],
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2 if preset != "tiny" else 1,
            norm_num_groups=32 if preset != "tiny" else 8,
            scaling_factor=0.13025 if preset == "sdxl" else 0.18215,
        ).eval()
        ours = copy.deepcopy(self.diffusers)
        self.projection = ours.encoder_hid_proj.image_projection_layers[0]
        self.layers = image_prompt.cross_attention_layers(ours)
        self.unet = graphs.unet(ours, ["plus"])
        fitted = copy.deepcopy(self.vae)
        fit_fp16_range(fitted)
        self.decoder = graphs.vae_decoder(fitted, graphs.FP16_FOR_BF16)

    def axes(self, rows: int, size: int) -> Axes:
        """Axes of the UNet and of the VAE for square pictures of ``size`` pixels."""
        side = size // FACTOR
        levels = {layer.level for layer in self.layers}
        queries = {f"q{level}": level_size(side, level) ** 2 for level in levels}
        prompts = {"groups_plus": 1, "tokens_plus": TOKENS}
        return {"batch": rows, "text": 77, "h": side, "w": side, "scale": SCALE, **prompts, **queries}

    def graphs(self, shapes: list[Axes]) -> list[tuple[Graph, list[Axes]]]:
        """The UNet, and the VAE, which has a row for two of the UNet's; with the axes that each is called at."""
        pictures = [axes | {"batch": axes["batch"] // 2} for axes in shapes]
        return [(self.unet, shapes), (self.decoder, pictures)]

    def inputs(self, rows: int, size: int, device: str) -> Tensors:
        """Inputs of the UNet: everything at random but what a request without region masks has."""
        tensors = self.unet.example(self.axes(rows, size), seed=rows)
        embeds = torch.randn(rows, PATCHES, CLIP_WIDTH, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            tensors["ip_tokens_plus"] = self.projection(embeds)[:, None]
        tensors["ip_bias_plus"].zero_()
        tensors["ip_scale_plus"].fill_(SCALE)
        for name in tensors:
            if name.startswith("ip_mask_"):
                tensors[name].fill_(1)
        tensors["timestep"] = tensors["timestep"][:1].expand(rows).clone()
        if "time_ids" in tensors:
            tensors["time_ids"] = torch.tensor([[size, size, 0, 0, size, size]]).float().repeat(rows, 1)
        return {name: tensor.to(device) for name, tensor in {**tensors, "image_embeds": embeds}.items()}


def _unet(preset: str) -> Any:
    """A UNet with an IP-Adapter plus in it, as ``load_ip_adapter`` leaves it."""
    unet = UNet2DConditionModel(**UNETS[preset]).eval()
    width = unet.config.cross_attention_dim
    processors = dict(unet.attn_processors)
    for layer in image_prompt.cross_attention_layers(unet):
        hidden = unet.get_submodule(layer.name).to_q.out_features
        processors[f"{layer.name}.processor"] = IPAdapterAttnProcessor2_0(hidden, width, (TOKENS,), scale=SCALE)
    unet.set_attn_processor(processors)
    projection = IPAdapterPlusImageProjection(
        embed_dims=CLIP_WIDTH,
        output_dims=width,
        hidden_dims=width,
        depth=4,
        dim_head=64,
        heads=max(width // 64, 1),
        num_queries=TOKENS,
    )
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    unet.config.encoder_hid_dim_type = "ip_image_proj"
    return unet.eval()


# --- Engines: from a case, shapes and a folder to what runs the UNet and the VAE ---


def diffusers_eager(case: Case, shapes: list[Axes], work: Path, options: argparse.Namespace) -> tuple[Run, Run]:
    return _diffusers(case, options, lambda module: module)


def diffusers_compiled(case: Case, shapes: list[Axes], work: Path, options: argparse.Namespace) -> tuple[Run, Run]:
    return _diffusers(case, options, lambda module: torch.compile(module, mode=options.compile_mode, dynamic=False))


def _diffusers(case: Case, options: argparse.Namespace, make: Callable[[Any], Any]) -> tuple[Run, Run]:
    """diffusers' own networks in the precision asked for; the VAE of SDXL in float32, as its pipelines have it."""
    dtype, vae_dtype = options.dtype, torch.float32 if case.preset == "sdxl" else options.dtype
    unet = make(copy.deepcopy(case.diffusers).to(options.device, dtype))
    vae = copy.deepcopy(case.vae).to(options.device, vae_dtype)
    decode = make(vae.decode)
    names = graphs.added_conditions(case.diffusers)

    def run_unet(tensors: Mapping[str, Tensor]) -> Tensor:
        added: dict[str, Any] = {name: tensors[name].to(dtype) for name in names}
        added["image_embeds"] = [tensors["image_embeds"].to(dtype)[:, None]]
        sample, text = (tensors[name].to(dtype) for name in ("sample", "encoder_hidden_states"))
        return unet(sample, tensors["timestep"], text, added_cond_kwargs=added, return_dict=False)[0].float()

    def run_vae(tensors: Mapping[str, Tensor]) -> Tensor:
        picture = decode((tensors["latents"] / vae.config.scaling_factor).to(vae_dtype), return_dict=False)[0]
        return ((picture.float() * 0.5 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).to(torch.uint8)

    return run_unet, run_vae


def aot_inductor(case: Case, shapes: list[Axes], work: Path, options: argparse.Namespace) -> tuple[Run, Run]:
    """torch.export and AOTInductor: needs torch (and its compiler) alone. An artifact for each shape."""
    unet, vae = (_inductor(graph, sizes, work, options) for graph, sizes in case.graphs(shapes))
    return unet, vae


def _inductor(graph: Graph, shapes: list[Axes], work: Path, options: argparse.Namespace) -> Run:
    dtype = dtype_of(graph, options.precision)
    loaded = {}
    graph.module.to(options.device)
    try:
        for index, axes in enumerate(shapes):
            example = tuple(tensor.to(options.device) for tensor in graph.example(axes).values())
            with torch.no_grad(), cast(graph.module, dtype):
                program = torch.export.export(Positional(graph, dtype).eval(), example, strict=False)
                file = str(work / f"{graph.name}-{index}.pt2")
                torch._inductor.aoti_compile_and_package(program, package_path=file)
            key = _key(graph, dict(zip((i.name for i in graph.inputs), example, strict=True)))
            loaded[key] = torch._inductor.aoti_load_package(file)
    finally:  # the engines after this one start from it
        graph.module.to("cpu")
    return lambda tensors: loaded[_key(graph, tensors)](*(tensors[i.name] for i in graph.inputs))[0]


def _key(graph: Graph, tensors: Mapping[str, Tensor]) -> tuple[Any, ...]:
    return tuple(tuple(tensors[tensor.name].shape) for tensor in graph.inputs)


def onnxruntime(case: Case, shapes: list[Axes], work: Path, options: argparse.Namespace) -> tuple[Run, Run]:
    """As imprompt serves it: exported to ONNX in the types asked for, with attention as one operator."""
    from imprompt_serving.backends.onnxruntime import check_cuda

    if options.device != "cpu":
        check_cuda()  # before the export, which takes long

    from imprompt_export.fused_attention import fuse_attention
    from imprompt_serving.gpu.onnxruntime import OnnxRuntimeDeviceEngine

    def make(graph: Graph) -> Run:
        folder = shutil.copytree(
            _exported(graph, work, options).parent, work / "onnxruntime" / graph.name, dirs_exist_ok=True
        )
        file = folder / f"{graph.name}.onnx"
        fuse_attention(file)
        return _run(graph, OnnxRuntimeDeviceEngine(file, options.device))

    return make(case.unet), make(case.decoder)


def tensorrt(backend: str) -> Callable[..., tuple[Run, Run]]:
    """The engines of TensorRT or TensorRT-RTX, as imprompt serves them, but tuned for the shapes that are measured."""

    def make(case: Case, shapes: list[Axes], work: Path, options: argparse.Namespace) -> tuple[Run, Run]:
        from imprompt_export.backends.tensorrt import Builder

        builder = Builder(backend, targets=_targets(), cache=options.cache)
        if options.device == "cpu":
            raise EngineError(f"engines of {backend} need a GPU to run")

        def built(graph: Graph, sizes: list[Axes]) -> Run:
            plan = work / backend / f"{graph.name}.plan"
            builder.build(_exported(graph, work, options), plan, [_profile(graph, axes) for axes in sizes])
            engine: Any = get_backend(backend).load(plan, device=options.device)
            return _run(graph, engine)

        unet, vae = (built(graph, sizes) for graph, sizes in case.graphs(shapes))
        return unet, vae

    return make


def _exported(graph: Graph, work: Path, options: argparse.Namespace) -> Path:
    """The ONNX file of `graph`, which several engines start from."""
    from imprompt_export.onnx_graph import export_onnx

    file = work / graph.name / f"{graph.name}.onnx"
    if not file.exists():
        export_onnx(graph, file, dtype_of(graph, options.precision))
    return file


def _run(graph: Graph, engine: DeviceEngine) -> Run:
    output = next(iter(graph.outputs))
    return lambda tensors: engine.run_tensors(tensors)[output]


def _targets() -> tuple[str, ...]:
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (8, 9)
    return (f"SM{major}{minor}",)


def _profile(graph: Graph, axes: Axes) -> Profile:
    """For one shape: an engine is tuned for each that is measured, as diffusers is compiled for each."""
    found: Profile = {}
    for tensor in graph.inputs:
        shape = tuple(int(axes[size]) if isinstance(size, str) else size for size in tensor.shape)
        found[tensor.name] = (shape, shape, shape)
    return found


ENGINES: dict[str, Callable[..., tuple[Run, Run]]] = {
    "diffusers": diffusers_eager,
    "torch.compile": diffusers_compiled,
    "aot_inductor": aot_inductor,
    "onnxruntime": onnxruntime,
    **{backend: tensorrt(backend) for backend in ("tensorrt", "tensorrt_rtx")},
}


# --- Measuring ---


def picture(unet: Run, vae: Run, tensors: Tensors, steps: int) -> Tensor:
    """Guided Euler steps over all rows, and the pictures of half of them."""
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(steps)
    latents = tensors["sample"].chunk(2)[0] * scheduler.init_noise_sigma.to(tensors["sample"])
    for timestep in scheduler.timesteps:
        sample = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
        # Not expanded: compiled code reads its inputs as if they were contiguous.
        given = {**tensors, "sample": sample, "timestep": timestep.to(sample).repeat(len(sample))}
        unconditional, conditional = unet(given).chunk(2)
        latents = scheduler.step(unconditional + GUIDANCE * (conditional - unconditional), timestep, latents)[0]
    return vae({"latents": latents})


def seconds(call: Callable[[], object], device: str, repeats: int) -> list[float]:
    """Wall seconds of each of ``repeats`` calls, after two that do not count."""
    found = []
    for index in range(repeats + 2):
        began = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        if index >= 2:
            found.append(time.perf_counter() - began)
    return found


def flops(case: Case, rows: int, size: int) -> float:
    """Floating point operations of one call of the UNet, without computing it."""
    meta: Any = copy.deepcopy(case.unet.module).to("meta")
    inputs = {name: tensor.to("meta") for name, tensor in case.unet.example(case.axes(rows, size)).items()}
    added = {name: inputs[name] for name in ("text_embeds", "time_ids") if name in inputs}
    prompts = next(p.prompts for p in meta.attn_processors.values() if hasattr(p, "prompts"))
    masks = {int(n[-1]): t for n, t in inputs.items() if n.startswith("ip_mask_")}
    tensors = {kind: inputs[f"ip_{kind}_plus"] for kind in ("tokens", "bias", "scale")}
    prompts.adapters = [AdapterPrompts.of(**tensors, masks=masks)]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        meta(inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"], added_cond_kwargs=added)
    return float(counter.get_total_flops())


def peak(options: argparse.Namespace) -> float:
    """FLOP/s of a large matrix product in this precision, here and now: the roof."""
    n = 8192 if options.device != "cpu" else 512
    a, b = (torch.randn(n, n, device=options.device, dtype=options.dtype) for _ in range(2))
    return float(2 * n**3 / statistics.median(seconds(lambda: a @ b, options.device, 10)))


def reference(case: Case, inputs: Tensors, device: str) -> Tensor:
    """The UNet in float32, as exported; convolutions too, which cuDNN would do in TF32."""
    module = Positional(case.unet).to(device)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        (answer,) = module(*(inputs[tensor.name] for tensor in case.unet.inputs))
    module.to("cpu")
    return answer


def measure(name: str, case: Case, work: Path, options: argparse.Namespace, expected: Tensor) -> dict[str, Any]:
    """Parity and times of one engine; a point that fails is skipped, with the reason."""
    points = [(callers, size) for size in options.size for callers in options.callers]
    shapes = [case.axes(2 * callers, size) for callers, size in points]
    began = time.perf_counter()
    unet, vae = ENGINES[name](case, shapes, work, options)
    made: dict[str, Any] = {"build_seconds": round(time.perf_counter() - began, 1), "points": []}
    with torch.no_grad():
        given = case.inputs(2 * points[0][0], points[0][1], options.device)
        made["parity"] = _parity(unet(given), expected)
        for callers, size in points:
            point: dict[str, Any] = {"size": size, "callers": callers}
            try:
                point |= _times(case, unet, vae, callers, size, options)
            except Exception as error:  # such as too little memory: those before and after it count all the same
                traceback.print_exc()
                point["skipped"] = f"{type(error).__name__}: {error}"
            made["points"].append(point)
    return made


def _times(case: Case, unet: Run, vae: Run, callers: int, size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a call of the UNet and of whole pictures, and what follows from them."""
    tensors = case.inputs(2 * callers, size, options.device)
    call = statistics.median(seconds(partial(unet, tensors), options.device, options.repeats))
    whole = seconds(partial(picture, unet, vae, tensors, options.steps), options.device, options.repeats)
    work_done = options.flops[callers, size]
    return {
        "unet_seconds": call,
        "unet_tflop": work_done / 1e12,
        "roofline": work_done / call / options.peak,
        "seconds": {"median": statistics.median(whole), "min": min(whole), "max": max(whole)},
        "images_per_second": callers / statistics.median(whole),
    }


def _parity(answer: Tensor, expected: Tensor) -> dict[str, float]:
    """Differences as shares of the largest value, and the angle."""
    difference, largest = (answer.float() - expected).abs(), expected.abs().max()
    cosine = nn.functional.cosine_similarity(answer.float().flatten(), expected.flatten(), dim=0)
    shares = {"max": difference.max() / largest, "mean": difference.mean() / largest, "cosine": cosine}
    return {key: float(value) for key, value in shares.items()}


def show(name: str, found: dict[str, Any]) -> None:
    if "skipped" in found:
        print(f"  {name:14} skipped: {found['skipped']}", flush=True)
        return
    parity = found["parity"]
    off = f"max {parity['max']:.1e}, mean {parity['mean']:.1e}"
    print(f"  {name:14} built in {found['build_seconds']} s; to float32: {off}")
    for point in found["points"]:
        print(f"    {point['size']:5} px, {point['callers']} callers: {_said(point)}", flush=True)


def _said(point: dict[str, Any]) -> str:
    if "skipped" in point:
        return f"skipped: {point['skipped']}"
    return (
        f"{point['seconds']['median']:.3f} s, {point['images_per_second']:.2f} images/s, "
        f"UNet {1000 * point['unet_seconds']:.1f} ms, {100 * point['roofline']:.0f} % of the roof"
    )


def environment(options: argparse.Namespace) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if options.device != "cpu" else None
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": gpu or platform.processor() or platform.machine(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "precision": options.precision,
        "peak_tflops": options.peak / 1e12,
        "steps": options.steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", action="append", choices=UNETS, help="default: sd15 and sdxl")
    parser.add_argument("--engine", action="append", choices=ENGINES, help="default: all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", default="fp16", choices=("fp32", "fp16", "bf16"))
    parser.add_argument("--size", action="append", type=int, help="pixels; default: 512 and 1024")
    parser.add_argument("--callers", action="append", type=int, help="default: 1 and 8")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile-mode", default="max-autotune")
    parser.add_argument("--cache", type=Path, default=None, help="where TensorRT's engines are kept")
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu.json"))
    options = parser.parse_args()
    options.size, options.callers = options.size or [512, 1024], options.callers or [1, 8]
    options.dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[options.precision]
    options.peak = peak(options)
    results: dict[str, Any] = {}
    for preset in options.preset or ["sd15", "sdxl"]:
        print(
            f"{preset}, {options.precision}; a matrix product makes {options.peak / 1e12:.1f} TFLOP/s here", flush=True
        )
        case = Case(preset)
        rows, size = 2 * options.callers[0], options.size[0]
        expected = reference(case, case.inputs(rows, size, options.device), options.device)
        # Before anything is traced, which leaves tensors without data in the graphs.
        points = [(callers, size) for size in options.size for callers in options.callers]
        options.flops = {(callers, size): flops(case, 2 * callers, size) for callers, size in points}
        results[preset] = {}
        with tempfile.TemporaryDirectory() as work:
            for name in options.engine or ENGINES:
                try:
                    found = measure(name, case, Path(work), options, expected)
                except (EngineError, ImportError) as error:
                    found = {"skipped": str(error)}
                except Exception as error:  # the others shall be measured all the same
                    traceback.print_exc()
                    found = {"skipped": f"{type(error).__name__}: {error}"}
                results[preset][name] = found
                show(name, found)
                torch._dynamo.reset()  # what torch.compile keeps of an engine, its CUDA graphs above all
                gc.collect()
                torch.cuda.empty_cache()
                content = {"environment": environment(options), "results": results}
                options.output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
