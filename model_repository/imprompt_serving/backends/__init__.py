"""Backends that run engines, each in one light module. Heavy packages are only imported when an engine is loaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch

MODULES = {
    "inductor": "inductor",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt",
}
"""The values of `engine.backend`, and the module of each in this package and in `imprompt_export.backends`."""
FLOATS = ("fp32", "fp16", "bf16")


class EngineError(RuntimeError):
    """An engine cannot be built, loaded, or run; the message says what to do."""


class Engine(Protocol):
    """A graph that is ready to run, with named inputs and outputs."""

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one call. Inputs are C-contiguous; the caller owns the outputs."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend(ABC):
    """Describes what the engines of one backend can do, and loads them."""

    name: str
    precisions: tuple[str, ...]
    suffix: str
    """The suffix of an engine's file."""
    extra: str
    """The extra of imprompt that must be installed where the engines run."""
    triton_platform: str | None = None
    """Triton's name for these files if it can host them itself, or None."""
    builds_for_ranges: bool = False
    """Whether an engine only takes the ranges of shapes that it was built for (`imprompt_export.profiles`)."""
    needs_gpu: bool = False
    """Whether an engine only runs on an NVIDIA GPU."""
    swaps_weights: bool = False
    """Whether requests may choose LoRAs; its engines are then `gpu.LoraEngine`s."""

    @property
    def hosts(self) -> tuple[str, ...]:
        """The values of `engine.host` that this backend supports."""
        return ("python", "native") if self.triton_platform else ("python",)

    def load(self, path: Path, *, threads: int = 0, device: str = "") -> Engine:
        """Load the engine at `path`, adding the backend's file suffix.

        Args:
            threads: threads for one call on the CPU; 0 for one per core.
            device: a torch device. With a CUDA device (`cuda:0`), the engine may also be a
                `imprompt_serving.gpu.DeviceEngine`.

        Raises:
            EngineError: a package is not installed, or the engine cannot run on this machine.
        """
        try:
            return self._load(path.with_suffix(self.suffix), threads, device)
        except ModuleNotFoundError as error:
            raise EngineError(f"{error}: install imprompt[{self.extra}] where the engines run") from None

    def buckets_rows(self, device: str) -> bool:
        """Return whether engines on `device` (as in `load`) only run certain numbers of rows (`specs.CallRows`)."""
        return self.needs_gpu or device.startswith("cuda")

    @abstractmethod
    def _load(self, file: Path, threads: int, device: str) -> Engine: ...

    @abstractmethod
    def device(self, index: int = 0) -> torch.device:
        """Return where the denoiser keeps its tensors with these engines: the GPU with this index, or the CPU."""


def get_backend(name: str) -> Backend:
    """Return the backend called `name`, a key of `MODULES`."""
    found: Backend = import_module(f"{__name__}.{MODULES[name]}").BACKENDS[name]
    return found
