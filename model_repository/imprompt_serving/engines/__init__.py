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
        """One call; inputs are C-contiguous, outputs are the caller's to keep."""
        ...


def load_engine(path: Path, backend: str, *, threads: int = 0, device: str = "") -> Engine:
    """The runner for ``path``, which was exported for ``backend`` and gets the ending of its files.

    With a ``device`` of torch's (``cuda:0``) the runner is a ``DeviceEngine`` of ``imprompt_serving.gpu`` too.

    Args:
        threads: of one call, on the CPU; 0 for one a core.

    Raises:
        EngineError: the package of the backend is not installed.
    """
    path = path.with_suffix(BACKENDS[backend].suffix)
    try:
        if BACKENDS[backend].compiled:
            from imprompt_serving.gpu.tensorrt import TensorRTEngine

            return TensorRTEngine(path, backend, device=device or "cuda")
        if backend == "openvino":
            from imprompt_serving.engines.openvino import OpenVinoEngine

            return OpenVinoEngine(path, threads=threads)
        if device.startswith("cuda"):
            from imprompt_serving.gpu.onnxruntime import OnnxRuntimeDeviceEngine

            return OnnxRuntimeDeviceEngine(path, device)
        from imprompt_serving.engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(path, threads=threads)
    except ModuleNotFoundError as error:
        raise EngineError(f"{error}: install imprompt[{BACKENDS[backend].extra}] where the engines run") from None
