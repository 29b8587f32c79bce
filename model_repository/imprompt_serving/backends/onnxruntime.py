"""Run ONNX files with ONNX Runtime, on the CPU or with the GPU build on NVIDIA GPUs."""

from __future__ import annotations

import ctypes
import importlib.metadata
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from imprompt_serving.backends import FLOATS, Backend, Engine, EngineError

if TYPE_CHECKING:
    import onnxruntime
    import torch

logger = logging.getLogger(__name__)

CUDA = "CUDAExecutionProvider"
DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")
"""The pip packages of ONNX Runtime for CPUs and for GPUs."""
CUDA_OPTIONS = {
    "use_tf32": "0",  # TF32 has only 10 bits of mantissa, too few for fp32 engines
    # An exhaustive search takes seconds for each new shape; cuDNN's heuristic returns at once.
    "cudnn_conv_algo_search": "HEURISTIC",
    "cudnn_conv_use_max_workspace": "1",  # otherwise the faster algorithms may not fit
}
"""https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html"""
_LOG_ERROR, _LOG_FATAL = 3, 4
_ON_SHAPES = {
    *("Shape", "Size", "Gather", "Concat", "Squeeze", "Unsqueeze", "Slice", "Split", "Cast", "Reshape", "Range"),
    *("Add", "Sub", "Mul", "Div", "Mod", "Floor", "Min", "Max", "Where", "Equal", "Less", "Greater", "Expand"),
    *("ConstantOfShape", "ReduceProd"),
}
"""Operators that compute shapes. ONNX Runtime keeps them on the CPU, because the host needs their results."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxRuntime(Backend):
    def _load(self, file: Path, threads: int, device: str) -> Engine:
        if device.startswith("cuda"):
            from imprompt_serving.gpu.onnxruntime import OnnxRuntimeDeviceEngine

            return OnnxRuntimeDeviceEngine(file, device)
        return OnnxRuntimeEngine(file, threads=threads)

    def buckets_rows(self, device: str) -> bool:
        """Return whether ONNX Runtime uses a GPU, wherever the tensors are: it picks convolution kernels per shape."""
        return built_for_cuda() and has_gpu()

    def device(self, index: int = 0) -> torch.device:
        import torch

        from imprompt_serving.gpu import cuda_or_cpu

        return cuda_or_cpu(index) if built_for_cuda() else torch.device("cpu")


def check_one_installed() -> None:
    """Check that only one of the two ONNX Runtime packages is installed.

    Both provide the module `onnxruntime` and overwrite each other's files, so which one works is undefined.

    Raises:
        EngineError: both are installed; the message says how to remove one.
    """
    if all(_is_installed(distribution) for distribution in DISTRIBUTIONS):
        raise EngineError(
            "onnxruntime and onnxruntime-gpu are both installed, and overwrite each other's files; for the GPU: "
            "pip uninstall onnxruntime && pip install --force-reinstall --no-deps onnxruntime-gpu; "
            "for the CPU, the other way around"
        )


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def built_for_cuda() -> bool:
    """Return whether the installed ONNX Runtime is the GPU build."""
    import onnxruntime

    # In newer builds CUDA is a plugin, which may not be listed before its libraries are found.
    return CUDA in onnxruntime.get_available_providers() or bool(onnxruntime.cuda_version)


def check_cuda() -> None:
    """Raise `EngineError` if the installed ONNX Runtime cannot use tensors on a GPU."""
    if not built_for_cuda():
        raise EngineError("the CPU build of ONNX Runtime is installed: install onnxruntime-gpu instead of onnxruntime")


def has_gpu() -> bool:
    """Return whether there is an NVIDIA GPU. Asks the driver, because some callers do not import torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def session(path: Path, *, threads: int = 0, gpu: int = 0, stream: int = 0) -> onnxruntime.InferenceSession:
    """Create a session on the GPU if there is one and ONNX Runtime is the GPU build, or else on the CPU.

    Args:
        threads: threads for one call on the CPU; 0 for one per core.
        gpu: the index of the GPU.
        stream: the handle of the CUDA stream to use; 0 lets the session create one.

    Raises:
        EngineError: ONNX Runtime cannot use the GPU. By default it would silently fall back to the CPU.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _LOG_ERROR
    if threads:
        options.intra_op_num_threads = threads
    # Several processes share the cores: threads that spin while idle would slow down the others.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not (built_for_cuda() and has_gpu()):
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    # The process-wide logger warns for every session that CUDA is not a plugin ("No registered plugin EP device").
    onnxruntime.set_default_logger_severity(_LOG_ERROR)
    onnxruntime.preload_dlls()  # CUDA libraries from pip packages, which otherwise only torch loads
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    chosen = CUDA_OPTIONS | {"device_id": str(gpu)} | ({"user_compute_stream": str(stream)} if stream else {})
    created = onnxruntime.InferenceSession(str(path), options, providers=[(CUDA, chosen), "CPUExecutionProvider"])
    if CUDA not in created.get_providers():
        raise EngineError(
            f"ONNX Runtime {onnxruntime.__version__} cannot use the GPU: the CUDA and cuDNN libraries that it is built "
            "for are missing (the CUDA build of torch brings its own), or the driver is too old; see its message above"
        )
    # The same logger prints an error for every convolution plan that cuDNN rejects before it accepts another. Real
    # failures are raised with the same text.
    onnxruntime.set_default_logger_severity(_LOG_FATAL)
    fallbacks = cpu_fallbacks(created)
    if fallbacks:
        named = ", ".join(f"{count} {operator}" for operator, count in fallbacks.most_common())
        logger.warning("%s: ONNX Runtime has no GPU kernel for %s, so these run on the CPU", path, named)
    return created


def cpu_fallbacks(created: onnxruntime.InferenceSession) -> Counter[str]:
    """Count the operators of a session that run on the CPU and do more than compute shapes.

    The option `session.disable_cpu_ep_fallback` does not help, as it also refuses operators that compute shapes.
    """
    return Counter(
        node.op_type
        for part in created.get_provider_graph_assignment_info()
        if part.ep_name == "CPUExecutionProvider"
        for node in part.get_nodes()
        if node.op_type not in _ON_SHAPES
    )


class OnnxRuntimeEngine:
    """An `InferenceSession` behind the engine interface. Safe to call from several threads."""

    def __init__(self, path: Path, *, threads: int = 0) -> None:
        self._session = session(path, threads=threads)
        self._inputs = {value.name: value.type for value in self._session.get_inputs()}
        self._outputs = [value.name for value in self._session.get_outputs()]

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        # The exporter drops inputs that a graph does not use, such as image tokens without image prompts.
        feeds = {
            name: value.astype(np.float16, copy=False) if self._inputs[name] == "tensor(float16)" else value
            for name, value in tensors.items()
            if name in self._inputs
        }
        return dict(zip(self._outputs, self._session.run(None, feeds), strict=True))


BACKENDS = {
    "onnxruntime": OnnxRuntime(
        name="onnxruntime", precisions=FLOATS, suffix=".onnx", extra="cpu", triton_platform="onnxruntime_onnx"
    )
}
