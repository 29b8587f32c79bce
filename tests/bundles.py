"""Make and export the tiny bundles that tests serve; exports are cached between sessions."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from rich.console import Console

from imprompt_demo import demo
from imprompt_export import export, graphs, onnx_graph
from imprompt_export.onnx_graph import export_onnx
from imprompt_export.stages import Stages
from tiny import adapters, base, control, embeddings, faces, layout, oracle, single_file

ROOT = Path(__file__).parents[1]
try:
    import insightface.model_zoo  # noqa: F401

    FACES = True
except ImportError:
    FACES = False
"""Whether `imprompt[face]` is installed, so that FaceID adapters can take pictures."""
LORAS: dict[str, control.LoraFormat] = {"soft": "kohya", "bold": "peft"}
"""The LoRAs of the bundle `inductor` for requests to choose."""
ZERO_SNR: dict[str, Any] = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
"""What the scheduler of the bundle `sd2` has besides v-prediction."""
SHAPES = """
[shapes]
height = [32, 64, 256]
width = [32, 64, 256]
rows = [1, 2, 8]
frames = [1, 8, 64]
"""


@dataclass(frozen=True, kw_only=True)
class ExportedBundle:
    """An exported bundle: its Triton repository, its checkpoints, and its adapters."""

    name: str
    repository: Path
    checkpoints: Path
    adapters: tuple[oracle.Adapter, ...]

    def oracle(self, cls: type[DiffusionPipeline] = StableDiffusionPipeline, **arguments: Any) -> Any:
        """Load the checkpoints and adapters into a diffusers pipeline, which gives the expected pictures."""
        return oracle.pipeline(self.checkpoints / "base", self.adapters, cls, **arguments)


def adapter(name: str, file: Path, root: Path, encoder: str | None) -> str:
    """Write an `[[ip_adapter]]` section; `encoder` is relative to `root`."""
    folder = f'"{encoder}"' if encoder else "false"
    return f"""
[[ip_adapter]]
name = "{name}"
path = "{root.name}"
subfolder = "{file.parent.relative_to(root).as_posix()}"
weight_name = "{file.name}"
image_encoder_folder = {folder}
"""


def _sd15(folder: Path) -> list[str]:
    """Make plain (`.bin`), plus (`.safetensors`), and full-face adapters in the public layout for SD1.5."""
    base.make_sd15(folder / "base")
    root = folder / "ip"
    adapters.make_image_encoder(root / "models/image_encoder")
    plain = adapters.make_adapter(root, "plain", weight_name="ip-adapter_sd15.bin")
    plus, face = (adapters.make_adapter(root, kind) for kind in ("plus", "full_face"))
    encoder = "models/image_encoder"
    return [
        adapter("plain", plain, root, encoder),
        adapter("plus", plus, root, encoder),
        adapter("full_face", face, root, encoder),
    ]


def _sd15_face(folder: Path) -> list[str]:
    """Make FaceID adapters: portrait, and plus v2 (its LoRA is fused); with a face encoder if insightface is there."""
    base.make_sd15(folder / "base", levels=2)
    root = folder / "ip"
    adapters.make_image_encoder(root / "models/image_encoder")
    portrait = adapters.make_adapter(root, "faceid_portrait", levels=2)
    plus = adapters.make_adapter(root, "faceid_plusv2", levels=2)
    return [
        _face_encoder(folder),
        adapter("portrait", portrait, root, None),
        adapter("plus_face", plus, root, "models/image_encoder"),
    ]


def _face_encoder(folder: Path) -> str:
    """Make a face encoder and return its section; the section is empty if insightface is not installed."""
    faces.make_face_models(folder / "buffalo")
    if not FACES:
        return ""
    return """
[face_encoder]
path = "buffalo"
det_size = [128, 128]
det_thresh = 0.8
"""


def _sd2(folder: Path) -> list[str]:
    """Make an SD 2.1 base as people find it: v-prediction, in a single file, with what others have trained for it.

    That is another VAE, a word with three vectors, a LoRA of the UNet and the text encoder, and an adapter for requests
    that bring embeddings. The folder `base` holds the configuration alone.
    """
    made = base.make_sd2(folder / "made", levels=2)
    single_file.write_base(made, folder / "base/sd2.safetensors")
    layout.copy_configuration(made, folder / "base")
    single_file.write_vae(base.make_sd2(folder / "other", levels=2, seed=7) / "vae", folder / "vae.ckpt")
    embeddings.make_embedding(folder, layout="a1111", width=64)
    lora = control.make_lora(folder / "lora", family="sd2", text_encoder=True, levels=2)
    root = folder / "ip"
    plus = adapters.make_adapter(root, "plus", family="sd2", weight_name="ip-adapter-plus_sd21.safetensors", levels=2)
    return [
        'weight_name = "sd2.safetensors"\nconfig = "base"\n',
        '\n[vae]\npath = "vae.ckpt"\n',
        '\n[[textual_inversion]]\npath = "embedding.pt"\n',
        f'\n[[lora]]\npath = "lora/{lora.name}"\nscale = 0.7\n',
        adapter("plus", plus, root, None),
        "\n[defaults]\nnum_inference_steps = 4\nguidance_scale = 3.0\nguidance_rescale = 0.7\n",
        'scheduler_config = { rescale_betas_zero_snr = true, timestep_spacing = "trailing" }\n',
    ]


def _sdxl(folder: Path) -> list[str]:
    """Make a plain adapter with the bigG encoder, and a plus adapter with the ViT-H encoder."""
    base.make_sdxl(folder / "base")
    root = folder / "ip"
    adapters.make_image_encoder(root / "sdxl_models/image_encoder", kind="big_g")
    adapters.make_image_encoder(root / "models/image_encoder")
    plain, plus = (adapters.make_adapter(root, kind, family="sdxl") for kind in ("plain", "plus"))
    return [
        adapter("plain", plain, root, "sdxl_models/image_encoder"),
        adapter("plus", plus, root, "models/image_encoder"),
    ]


def _sdxl_refiner(folder: Path) -> list[str]:
    base.make_sdxl_refiner(folder / "base")
    return []


def _inpaint(folder: Path) -> list[str]:
    """Make an inpainting UNet (nine input channels), and serve it with two denoisers, which also works on a CPU."""
    base.make_sd15(folder / "base", in_channels=9, levels=2)
    return ["\n[engine]\ndevices = [0, 1]\n", _plain(folder, levels=2)]


def _lcm(folder: Path) -> list[str]:
    """Make a distilled base (guidance is an input of its UNet) with an LCM-LoRA, a safety checker, and a ControlNet.

    The ControlNet is in a single file.
    """
    base.make_sd15(folder / "base", safety_checker=True, time_cond_proj_dim=32, levels=2)
    lora = control.make_lora(folder / "lora", levels=2)
    section = f"""
[[lora]]
path = "lora"
weight_name = "{lora.name}"
"""
    depth = control.make_controlnet(folder / "depth", levels=2)
    single_file.write_controlnet(depth, folder / "depth.pth")
    net = '\n[[controlnet]]\nname = "depth"\npath = "depth.pth"\nconfig = "depth"\n'
    return [section, _plain(folder, levels=2), net]


def _control(folder: Path) -> list[str]:
    """Make a UNet of two resolutions with two ControlNets, a T2I-Adapter, a motion adapter, and a plain adapter."""
    base.make_sd15(folder / "base", levels=2)
    motion = control.make_motion_adapter(folder / "motion", levels=2)
    return [
        f'\n[motion_adapter]\npath = "{motion.name}"\n',
        controlnet("depth", control.make_controlnet(folder / "depth", levels=2)),
        t2i_adapter("sketch", control.make_t2i_adapter(folder / "sketch", levels=2)),
        controlnet("canny", control.make_controlnet(folder / "canny", levels=2, seed=1)),
        _plain(folder, levels=2),
    ]


def _sdxl_control(folder: Path) -> list[str]:
    """Make a small SDXL base in half precision with a ControlNet, a T2I-Adapter, and a word for both text encoders."""
    layout.as_variant(base.make_sdxl(folder / "base", layers_per_block=1), "fp16")
    embeddings.make_embedding(folder, layout="sdxl", vectors=2)
    return [
        'variant = "fp16"\n',
        '\n[[textual_inversion]]\npath = "learned_embeds.safetensors"\ntoken = "<toy>"\n',
        controlnet("depth", control.make_controlnet(folder / "depth", family="sdxl", layers_per_block=1)),
        t2i_adapter("sketch", control.make_t2i_adapter(folder / "sketch", family="sdxl")),
    ]


def _openvino(folder: Path) -> list[str]:
    """Make OpenVINO engines: a UNet of two resolutions with a ControlNet and a plain adapter."""
    return ['\n[engine]\nbackend = "openvino"\n', *_with_depth(folder)]


def _int8(folder: Path) -> list[str]:
    """Make the same bundle as `openvino`, in int8."""
    return ['\n[engine]\nbackend = "openvino"\nprecision = "int8"\n', *_with_depth(folder)]


def _bf16(folder: Path) -> list[str]:
    """Make the same bundle as `openvino`, in bf16."""
    return ['\n[engine]\nbackend = "openvino"\nprecision = "bf16"\n', *_with_depth(folder)]


def _with_depth(folder: Path) -> list[str]:
    base.make_sd15(folder / "base", levels=2)
    depth = controlnet("depth", control.make_controlnet(folder / "depth", levels=2))
    return [depth, _plain(folder, levels=2)]


def _inductor(folder: Path) -> list[str]:
    """Make AOTInductor packages: a UNet of two resolutions with a plain and a plus adapter, and two LoRAs."""
    base.make_sd15(folder / "base", levels=2)
    root = folder / "ip"
    adapters.make_image_encoder(root / "models/image_encoder")
    made = {kind: adapters.make_adapter(root, kind, levels=2) for kind in ("plain", "plus")}
    sections = [adapter(kind, file, root, "models/image_encoder") for kind, file in made.items()]
    for seed, (name, fmt) in enumerate(LORAS.items(), 1):
        file = control.make_lora(folder / "loras", fmt=fmt, weight_name=f"{name}.safetensors", levels=2, seed=seed)
        sections.append(f'\n[[lora]]\nname = "{name}"\npath = "loras/{file.name}"\nfused = false\n')
    return ['\n[engine]\nbackend = "inductor"\n', *sections]


def controlnet(name: str, folder: Path) -> str:
    """Write a `[[controlnet]]` section."""
    return f"""
[[controlnet]]
name = "{name}"
path = "{folder.name}"
"""


def t2i_adapter(name: str, folder: Path) -> str:
    """Write a `[[t2i_adapter]]` section."""
    return controlnet(name, folder).replace("controlnet", "t2i_adapter")


def _plain(folder: Path, levels: int = 4) -> str:
    """Make a plain adapter for SD1.5 and return its section."""
    root = folder / "ip"
    adapters.make_image_encoder(root / "models/image_encoder")
    plain = adapters.make_adapter(root, "plain", levels=levels)
    return adapter("plain", plain, root, "models/image_encoder")


MAKERS: dict[str, Callable[[Path], list[str]]] = {
    "sd15": _sd15,
    "openvino": _openvino,
    "control": _control,
    "sdxl_control": _sdxl_control,
    "sd2": _sd2,
    "sd15_face": _sd15_face,
    "lcm": _lcm,
    "sdxl": _sdxl,
    "sdxl_refiner": _sdxl_refiner,
    "inpaint": _inpaint,
    "int8": _int8,
    "bf16": _bf16,
    "inductor": _inductor,
}
"""Writes the checkpoints of each bundle and returns its sections; in the order in which the tests use them."""


def make(name: str, cache: Path) -> ExportedBundle:
    """Make and export bundle `name`, or return the one in `cache` if its sources have not changed since."""
    folder = cache / f"{name}-{_sources()}"
    with locked(folder.with_name(f"{folder.name}.lock")):
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            _export(name, folder, cache / f"graphs-{_sources()}")
            (folder / "done").touch()
    repository, loaded = folder / "repository", tuple(_read_adapters(folder))
    return ExportedBundle(name=name, repository=repository, checkpoints=folder, adapters=loaded)


def make_demo(folder: Path) -> Path:
    """Export the bundles of the demo under `folder` unless they are up to date, and return their repository."""
    with locked(folder / "lock"):
        return demo.export_once(folder)


def _export(name: str, folder: Path, traced: Path) -> None:
    sections = "".join(MAKERS[name](folder))
    (folder / "bundle.toml").write_text(f'name = "{name}"\nbase = "base"\n{sections}{SHAPES}')
    with mock.patch.object(onnx_graph, "export_onnx", partial(_export_once, traced)), open(os.devnull, "w") as nowhere:
        export(folder / "bundle.toml", folder / "repository", Console(file=nowhere))


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock on `file`, so that only one process exports to a folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _export_once(cache: Path, graph: graphs.Graph, path: Path, dtype: torch.dtype, stages: Stages) -> None:
    """Replace `export_onnx`: graphs that bundles have in common, mostly encoders and VAEs, are traced only once."""
    config: Any = getattr(graph.module, "config", {})
    values = {**(config if isinstance(config, dict) else config.to_dict()), "_name_or_path": type(graph.module)}
    digest = hashlib.sha256(repr((graph.inputs, graph.outputs, graph.checks, values, dtype)).encode())
    for name, tensor in graph.module.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    kept = cache / f"{digest.hexdigest()[:16]}.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(kept.with_suffix(".lock")):  # another process may just be tracing the same graph
        if not kept.exists():
            export_onnx(graph, path, dtype, stages)
            unfinished = cache / f"{kept.name}.{os.getpid()}"
            shutil.copyfile(path, unfinished)
            unfinished.rename(kept)
            return
    shutil.copyfile(kept, path)


def give_way() -> None:
    """Lower the priority of this export process below the tests' servers.

    Triton gives up on a Python model that does not respond for 1 s.
    """
    os.nice(10)
    torch.set_num_threads(1)


def _read_adapters(folder: Path) -> list[oracle.Adapter]:
    sections = tomllib.loads((folder / "bundle.toml").read_text()).get("ip_adapter", [])
    return [
        oracle.Adapter(
            path=folder / section["path"],
            weight_name=section["weight_name"],
            subfolder=section["subfolder"],
            image_encoder_folder=section["image_encoder_folder"] or None,
        )
        for section in sections
    ]


def _sources() -> str:
    """Hash every source file that determines the content of an exported bundle."""
    digest = hashlib.sha256(bytes([FACES]))
    serving = ROOT / "model_repository/imprompt_serving"
    files = [*(ROOT / "export").rglob("*.py"), *(ROOT / "tests/tiny").glob("*.py"), Path(__file__)]
    files += [file for package in ("backends", "families") for file in (serving / package).glob("*.py")]
    files += [
        serving / f"{name}.py"
        for name in ("capabilities", "config", "parameters", "scheduler_names", "specs", "tensor_names", "wire")
    ]
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
