"""ONNX Runtime in process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime


def session(path: Path, *, threads: int = 0, gpu: int = 0) -> onnxruntime.InferenceSession:
    """A session on the GPU where ONNX Runtime has been built for one and finds it, or else on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    # Sessions of several processes share the cores: a spinning pool would take them from the others.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Without TF32, whose 10 bits are not what float32 promises.
    cuda = {"device_id": str(gpu), "use_tf32": "0"}
    wanted: dict[str, dict[str, str]] = {"CUDAExecutionProvider": cuda, "CPUExecutionProvider": {}}
    available = onnxruntime.get_available_providers()
    providers = [(name, settings) for name, settings in wanted.items() if name in available]
    return onnxruntime.InferenceSession(str(path), options, providers=providers)


class OnnxRuntimeEngine:
    """An ``InferenceSession`` behind the engine interface; safe to call from several threads."""

    def __init__(self, path: Path, *, threads: int = 0) -> None:
        self._session = session(path, threads=threads)
        self._inputs = {value.name for value in self._session.get_inputs()}
        self._outputs = [value.name for value in self._session.get_outputs()]

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        # The exporter drops inputs that a graph does not use (the tokens of an encoder without image prompts, say).
        feeds = {name: value for name, value in tensors.items() if name in self._inputs}
        return dict(zip(self._outputs, self._session.run(None, feeds), strict=True))
