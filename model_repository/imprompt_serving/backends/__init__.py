"""Backends: how engines are run. One light module each; heavy packages are imported when an engine is loaded."""

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
"""The values of `engine.backend`, and the module of each: of this package, and of `imprompt_export.backends`."""
FLOATS = ("fp32", "fp16", "bf16")


class EngineError(RuntimeError):
    """An engine cannot be built, loaded or run; the message says what to do about it."""


class Engine(Protocol):
    """A graph, ready to run. Tensors go in and come out by name."""

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One call; inputs are C-contiguous, outputs are the caller's to keep."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend(ABC):
    """What engines of one backend can do, and how they are loaded."""

    name: str
    precisions: tuple[str, ...]
    suffix: str
    """Of an engine's file."""
    extra: str
    """The extra of imprompt that is needed where the engines run."""
    triton_platform: str | None = None
    """What Triton calls these files when it hosts them itself; None where it cannot."""
    builds_for_ranges: bool = False
    """Whether an engine takes only the ranges of shapes that it was built for (`imprompt_export.profiles`)."""
    needs_gpu: bool = False
    """Whether an engine runs on an NVIDIA GPU alone."""
    swaps_weights: bool = False
    """Whether requests may choose LoRAs: its engines are `gpu.LoraEngine`s."""

    @property
    def hosts(self) -> tuple[str, ...]:
        """The values of `engine.host` that go with it."""
        return ("python", "native") if self.triton_platform else ("python",)

    def load(self, path: Path, *, threads: int = 0, device: str = "") -> Engine:
        """Load the engine at `path`, adding the suffix of its file.

        Given a CUDA `device` of torch's (`cuda:0`), the engine is a `DeviceEngine` of `imprompt_serving.gpu` too.

        Args:
            threads: threads of one call on the CPU; 0 for one a core.

        Raises:
            EngineError: a package is not installed, or the engine cannot run here.
        """
        try:
            return self._load(path.with_suffix(self.suffix), threads, device)
        except ModuleNotFoundError as error:
            raise EngineError(f"{error}: install imprompt[{self.extra}] where the engines run") from None

    def buckets_rows(self, device: str) -> bool:
        """Whether engines on `device` (as for `load`) run few numbers of rows alone (`specs.CallRows`)."""
        return self.needs_gpu or device.startswith("cuda")

    @abstractmethod
    def _load(self, file: Path, threads: int, device: str) -> Engine: ...

    @abstractmethod
    def device(self, index: int = 0) -> torch.device:
        """Where the denoiser keeps its tensors beside these engines: the GPU of this number, or the CPU."""


def get_backend(name: str) -> Backend:
    """The backend called `name`, a key of `MODULES`."""
    found: Backend = import_module(f"{__name__}.{MODULES[name]}").BACKENDS[name]
    return found
