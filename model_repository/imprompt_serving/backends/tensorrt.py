"""TensorRT and TensorRT-RTX: two packages with one interface, and what an engine file says of itself."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from imprompt_serving.backends import FLOATS, Backend, Engine, EngineError
from imprompt_serving.backends.files import write_whole

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRT(Backend):
    builds_for_ranges: bool = True
    needs_gpu: bool = True
    modules: tuple[str, ...]
    """Names that the package may be imported by."""
    oldest: tuple[int, int]
    """The first version that has everything used here."""
    finishes_on_gpu: bool = False
    """Whether kernels are compiled by the GPU that runs an engine, so that building one needs no GPU."""

    def package(self) -> Any:
        """The Python module.

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
"""Those that TensorRT-RTX does not build for, by compute capability."""


def refuse_data_center_gpu(target: str) -> None:
    """Raise for a GPU that TensorRT-RTX will never run on; what else runs there is in the message."""
    if target in DATA_CENTER_GPUS:
        raise EngineError(
            f"TensorRT-RTX is not for {DATA_CENTER_GPUS[target]}, compute capability {capability(target)}: "
            'use engine.backend = "tensorrt", "inductor" or "onnxruntime"'
        )


def capability(target: str) -> str:
    """`SM89` -> `8.9`."""
    digits = target.removeprefix("SM")
    return f"{digits[:-1]}.{digits[-1:]}"


class EngineTensor(msgspec.Struct, frozen=True, kw_only=True):
    """An input or output: its type, its shape (-1: dynamic), and of inputs [min, opt, max] in each profile."""

    dtype: str
    shape: tuple[int, ...]
    profiles: tuple[tuple[tuple[int, ...], ...], ...] = ()


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine was built from and for; kept as JSON beside it.

    `model` is a hash of the graph with its weights, `architecture` one without: engines of equal architecture can
    take each other's weights. `target` is the name of the GPU, or the compute capabilities that were asked for.
    """

    backend: str
    version: str
    target: str
    model: str
    architecture: str
    settings: str
    """A hash of the profiles, of whether the weights can be replaced, and of how this version of imprompt builds."""
    refit: bool
    inputs: dict[str, EngineTensor] = {}
    outputs: dict[str, EngineTensor] = {}
    """As the builder understood the graph. Inputs that a graph does not use are not there."""
    platform: str = ""
    """Versions of the driver and of CUDA that it was built with; empty for TensorRT-RTX, which builds without."""
    attention: int = 0
    fused_attention: int | None = None
    """Attention layers of the graph, and how many are one kernel. TensorRT-RTX chooses kernels where it runs: None."""

    def save(self, engine: Path) -> None:
        write_whole(_beside(engine), msgspec.json.format(msgspec.json.encode(self)) + b"\n")

    @classmethod
    def load(cls, engine: Path) -> EngineInfo:
        return msgspec.json.decode(_beside(engine).read_bytes(), type=cls)

    @classmethod
    def check(cls, engine: Path, version: str) -> None:
        """Raise for an engine that another version of the package has built."""
        info = cls.load(engine)
        if info.version != version:
            raise EngineError(
                f"{engine.name} was built by {info.backend} {info.version}, but {version} is installed here: "
                "export the bundle again, or install that version"
            )


def _beside(engine: Path) -> Path:
    return engine.with_suffix(".json")
