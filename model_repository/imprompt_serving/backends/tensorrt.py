"""Load TensorRT and TensorRT-RTX, two packages with the same interface, and describe their engines."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from imprompt_serving.backends import FLOATS, Backend, Engine, EngineError
from imprompt_serving.backends.files import write_atomically

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRT(Backend):
    builds_for_ranges: bool = True
    needs_gpu: bool = True
    modules: tuple[str, ...]
    """Names under which the package may be imported."""
    oldest: tuple[int, int]
    """The oldest supported version."""
    finishes_on_gpu: bool = False
    """Whether kernels are compiled where an engine runs, so that building one needs no GPU."""

    def package(self) -> Any:
        """Import the Python module.

        Raises:
            EngineError: it is not installed, or too old; the message says what to install.
        """
        for name in self.modules:
            try:
                module = importlib.import_module(name)
            except ImportError:
                continue
            if tuple(int(part) for part in module.__version__.split(".")[:2]) < self.oldest:
                oldest = ".".join(map(str, self.oldest))
                raise EngineError(f"{self.name} {module.__version__} is too old; {oldest} or newer is needed")
            return module
        install = f'pip install "imprompt[{self.extra}]"'
        raise EngineError(f'engine.backend = "{self.name}" needs {self.modules[0]}: {install}')

    def _load(self, file: Path, threads: int, device: str) -> Engine:
        from imprompt_serving.gpu.tensorrt import TensorRTEngine

        return TensorRTEngine(file, self, device=device or "cuda")

    def device(self, index: int = 0) -> torch.device:
        from imprompt_serving.gpu import cuda_or_cpu

        return cuda_or_cpu(index)


TENSORRT = TensorRT(
    name="tensorrt",
    precisions=FLOATS,
    suffix=".plan",
    extra="gpu",
    triton_platform="tensorrt_plan",
    modules=("tensorrt",),
    oldest=(10, 12),
)
TENSORRT_RTX = TensorRT(
    name="tensorrt_rtx",
    precisions=FLOATS,
    suffix=".plan",
    extra="rtx",
    modules=("tensorrt_rtx", "tensorrt_rtx_bindings"),  # the bindings are a wheel of their own
    oldest=(1, 4),
    finishes_on_gpu=True,
)
BACKENDS = {backend.name: backend for backend in (TENSORRT, TENSORRT_RTX)}


DATA_CENTER_GPUS = {
    "SM90": "Hopper data center GPUs (H100, H200)",
    "SM100": "Blackwell data center GPUs (B200, GB200)",
    "SM103": "Blackwell Ultra data center GPUs (B300, GB300)",
}
"""GPUs that TensorRT-RTX does not support, by compute capability."""


def refuse_data_center_gpu(target: str) -> None:
    """Raise `EngineError` for a GPU that TensorRT-RTX does not support. The message names backends that do."""
    if target in DATA_CENTER_GPUS:
        raise EngineError(
            f"TensorRT-RTX does not support {DATA_CENTER_GPUS[target]}, compute capability {capability(target)}: "
            'use engine.backend = "tensorrt", "inductor" or "onnxruntime"'
        )


def capability(target: str) -> str:
    """Format a target such as `SM89` as a compute capability, `8.9`."""
    digits = target.removeprefix("SM")
    return f"{digits[:-1]}.{digits[-1:]}"


class EngineTensor(msgspec.Struct, frozen=True, kw_only=True):
    """An input or output of an engine."""

    dtype: str
    shape: tuple[int, ...]
    """Dynamic axes are -1."""
    profiles: tuple[tuple[tuple[int, ...], ...], ...] = ()
    """For inputs, the shapes [min, opt, max] in each profile."""


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine was built from and for, saved as a JSON file next to it."""

    backend: str
    version: str
    """The version of the package that built it."""
    target: str
    """The name of the GPU, or the requested compute capabilities."""
    model: str
    """A hash of the graph with its weights."""
    architecture: str
    """A hash of the graph without its weights. Engines with equal architectures can take each other's weights."""
    settings: str
    """A hash of the profiles, of whether the weights can be replaced, and of how this version of imprompt builds."""
    refit: bool
    """Whether the weights can be replaced."""
    inputs: dict[str, EngineTensor] = {}
    """Inputs of the engine, as the builder understood the graph, without those that the graph does not use."""
    outputs: dict[str, EngineTensor] = {}
    platform: str = ""
    """The versions of the driver and of CUDA that built it; empty for TensorRT-RTX, which needs neither to build."""
    attention: int = 0
    """The number of attention layers in the graph."""
    fused_attention: int | None = None
    """How many of them are one kernel; None for TensorRT-RTX, which chooses kernels where it runs."""

    def save(self, engine: Path) -> None:
        """Save this description next to `engine`."""
        write_atomically(_info_file(engine), msgspec.json.format(msgspec.json.encode(self)) + b"\n")

    @classmethod
    def load(cls, engine: Path) -> EngineInfo:
        """Read the description of `engine`."""
        return msgspec.json.decode(_info_file(engine).read_bytes(), type=cls)

    @classmethod
    def check(cls, engine: Path, version: str) -> None:
        """Raise `EngineError` if another version of the package built `engine`."""
        info = cls.load(engine)
        if info.version != version:
            raise EngineError(
                f"{engine.name} was built by {info.backend} {info.version}, but {version} is installed: "
                "export the bundle again, or install that version"
            )


def _info_file(engine: Path) -> Path:
    return engine.with_suffix(".json")
