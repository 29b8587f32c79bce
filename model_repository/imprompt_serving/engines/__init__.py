"""Engine runners: the one interface between a compiled graph and whoever calls it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np


class Engine(Protocol):
    """A compiled graph. Tensors go in and come out by name."""

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One call; inputs are C-contiguous."""
        ...


def load_engine(path: Path, backend: str, *, threads: int | None = None) -> Engine:
    """The runner for ``path``, which was exported for ``backend``."""
    if backend == "onnxruntime":
        from imprompt_serving.engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(path, threads=threads)
    raise ValueError(f"no engine runner for backend {backend!r}")
