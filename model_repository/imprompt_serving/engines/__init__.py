"""Engine runners: the one interface between a compiled graph and whoever calls it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from imprompt_serving.engines.backends import BACKENDS, Backend, EngineError

__all__ = ["BACKENDS", "Backend", "Engine", "EngineError", "load_engine"]


class Engine(Protocol):
    """A compiled graph. Tensors go in and come out by name."""

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One call; inputs are C-contiguous."""
        ...


def load_engine(path: Path, backend: str, *, threads: int | None = None, device: str = "") -> Engine:
    """The runner for ``path``, which was exported for ``backend``.

    With a ``device`` of torch's (``cuda:0``) the runner is a ``DeviceEngine`` of ``imprompt_serving.gpu`` too.
    """
    if BACKENDS[backend].compiled:
        from imprompt_serving.gpu.tensorrt import TensorRTEngine

        return TensorRTEngine(path, backend, device=device or "cuda")
    if backend == "onnxruntime" and device.startswith("cuda"):
        from imprompt_serving.gpu.onnxruntime import OnnxRuntimeDeviceEngine

        return OnnxRuntimeDeviceEngine(path, device)
    if backend == "onnxruntime":
        from imprompt_serving.engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(path, threads=threads)
    raise ValueError(f"no engine runner for backend {backend!r}")
