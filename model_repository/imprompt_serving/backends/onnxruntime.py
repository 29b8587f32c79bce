"""ONNX Runtime: on the CPU, and on NVIDIA GPUs where it is built for them."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from imprompt_serving.backends import FLOATS, Backend, Engine, EngineError

if TYPE_CHECKING:
    import onnxruntime
    import torch

CUDA = "CUDAExecutionProvider"


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxRuntime(Backend):
    def _load(self, file: Path, threads: int, device: str) -> Engine:
        if device.startswith("cuda"):
            from imprompt_serving.gpu.onnxruntime import OnnxRuntimeDeviceEngine

            return OnnxRuntimeDeviceEngine(file, device)
        return OnnxRuntimeEngine(file, threads=threads)

    def buckets_rows(self, device: str) -> bool:
        """On a GPU, whatever the device of the tensors: CUDA's convolutions are searched for at each new shape."""
        return built_for_cuda() and gpu_there()

    def device(self, index: int = 0) -> torch.device:
        import torch

        from imprompt_serving.gpu import cuda_or_cpu

        return cuda_or_cpu(index) if built_for_cuda() else torch.device("cpu")


def built_for_cuda() -> bool:
    """Whether the ONNX Runtime that is installed is the one for GPUs."""
    import onnxruntime

    # Newer builds have CUDA as a plugin, which may not be listed before its libraries are found.
    return CUDA in onnxruntime.get_available_providers() or bool(onnxruntime.cuda_version)


def check_cuda() -> None:
    """Raise where tensors on a GPU could not be used."""
    if not built_for_cuda():
        raise EngineError("ONNX Runtime is the one for CPUs here: install onnxruntime-gpu in the place of onnxruntime")


def gpu_there() -> bool:
    """Whether there is an NVIDIA GPU, by its driver: processes that ask this do without torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def session(path: Path, *, threads: int = 0, gpu: int = 0) -> onnxruntime.InferenceSession:
    """A session on the GPU where ONNX Runtime has been built for one and there is one, or else on the CPU.

    Raises:
        EngineError: ONNX Runtime cannot use the GPU; by itself it would go on with the CPU, and say nothing.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    # Sessions of several processes share the cores: a spinning pool would take them from the others.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    on_gpu = built_for_cuda() and gpu_there()
    providers: list[Any] = ["CPUExecutionProvider"]
    if on_gpu:
        onnxruntime.preload_dlls()  # CUDA's libraries out of pip's packages, which only torch would have loaded
        # Without TF32, whose 10 bits are not what float32 promises.
        providers.insert(0, (CUDA, {"device_id": gpu, "use_tf32": "0"}))
    made = onnxruntime.InferenceSession(str(path), options, providers=providers)
    if on_gpu and CUDA not in made.get_providers():
        raise EngineError(
            f"ONNX Runtime {onnxruntime.__version__} cannot use the GPU: the CUDA and cuDNN libraries that it is built "
            "for are missing (the CUDA build of torch brings its own), or the driver is too old; see its message above"
        )
    return made


class OnnxRuntimeEngine:
    """An `InferenceSession` behind the engine interface; safe to call from several threads."""

    def __init__(self, path: Path, *, threads: int = 0) -> None:
        self._session = session(path, threads=threads)
        self._inputs = {value.name for value in self._session.get_inputs()}
        self._outputs = [value.name for value in self._session.get_outputs()]

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        # The exporter drops inputs that a graph does not use (the tokens of an encoder without image prompts, say).
        feeds = {name: value for name, value in tensors.items() if name in self._inputs}
        return dict(zip(self._outputs, self._session.run(None, feeds), strict=True))


BACKENDS = {
    "onnxruntime": OnnxRuntime(
        name="onnxruntime", precisions=FLOATS, suffix=".onnx", extra="server", triton_platform="onnxruntime_onnx"
    )
}
