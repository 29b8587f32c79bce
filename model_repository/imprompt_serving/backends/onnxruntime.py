"""ONNX Runtime: on the CPU, and on NVIDIA GPUs where it is built for them."""

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
"""What `pip` calls ONNX Runtime for CPUs, and for GPUs."""
CUDA_OPTIONS = {
    "use_tf32": "0",  # whose 10 bits are not what float32 promises
    # Trying every algorithm takes seconds for each new shape; cuDNN's own estimate takes none.
    "cudnn_conv_algo_search": "HEURISTIC",
    "cudnn_conv_use_max_workspace": "1",  # or the faster algorithms may not fit
}
"""https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html"""
_LOG_ERROR, _LOG_FATAL = 3, 4
_ON_SHAPES = {
    *("Shape", "Size", "Gather", "Concat", "Squeeze", "Unsqueeze", "Slice", "Split", "Cast", "Reshape", "Range"),
    *("Add", "Sub", "Mul", "Div", "Mod", "Floor", "Min", "Max", "Where", "Equal", "Less", "Greater", "Expand"),
    *("ConstantOfShape", "ReduceProd"),
}
"""Operators that compute shapes: ONNX Runtime keeps those on the CPU, beside the host that needs the answers."""


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


def check_one_installed() -> None:
    """Refuse an environment with the ONNX Runtime for CPUs and the one for GPUs.

    Both are the module `onnxruntime`: the files of one lie over those of the other, and which works is chance.

    Raises:
        EngineError: says which to remove.
    """
    if all(_is_installed(distribution) for distribution in DISTRIBUTIONS):
        raise EngineError(
            "onnxruntime and onnxruntime-gpu are both installed, and overwrite each other's files; for the GPU: "
            "pip uninstall onnxruntime && pip install --force-reinstall --no-deps onnxruntime-gpu; "
            "for the CPU the other way around"
        )


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


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


def session(path: Path, *, threads: int = 0, gpu: int = 0, stream: int = 0) -> onnxruntime.InferenceSession:
    """A session on the GPU where ONNX Runtime has been built for one and there is one, or else on the CPU.

    Args:
        stream: handle of the CUDA stream that all work goes to; 0 for one of the session's own.

    Raises:
        EngineError: ONNX Runtime cannot use the GPU; by itself it would go on with the CPU, and say nothing.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _LOG_ERROR
    if threads:
        options.intra_op_num_threads = threads
    # Sessions of several processes share the cores: a spinning pool would take them from the others.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not (built_for_cuda() and gpu_there()):
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    # Every session warns that CUDA is no plugin ("No registered plugin EP device"), by the process's logger.
    onnxruntime.set_default_logger_severity(_LOG_ERROR)
    onnxruntime.preload_dlls()  # CUDA's libraries out of pip's packages, which only torch would have loaded
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    chosen = CUDA_OPTIONS | {"device_id": str(gpu)} | ({"user_compute_stream": str(stream)} if stream else {})
    made = onnxruntime.InferenceSession(str(path), options, providers=[(CUDA, chosen), "CPUExecutionProvider"])
    if CUDA not in made.get_providers():
        raise EngineError(
            f"ONNX Runtime {onnxruntime.__version__} cannot use the GPU: the CUDA and cuDNN libraries that it is built "
            "for are missing (the CUDA build of torch brings its own), or the driver is too old; see its message above"
        )
    # That logger has an error line for each plan of a convolution that cuDNN refuses before another is taken. What
    # fails for good is raised, with the same text.
    onnxruntime.set_default_logger_severity(_LOG_FATAL)
    strays = computed_on_cpu(made)
    if strays:
        named = ", ".join(f"{count} {operator}" for operator, count in strays.most_common())
        logger.warning("%s: ONNX Runtime has no kernel on the GPU for %s: these run on the CPU", path, named)
    return made


def computed_on_cpu(made: onnxruntime.InferenceSession) -> Counter[str]:
    """Operators of a session on the CPU that do more than compute shapes, with how many there are of each.

    (`session.disable_cpu_ep_fallback` would refuse the shapes too.)
    """
    return Counter(
        node.op_type
        for part in made.get_provider_graph_assignment_info()
        if part.ep_name == "CPUExecutionProvider"
        for node in part.get_nodes()
        if node.op_type not in _ON_SHAPES
    )


class OnnxRuntimeEngine:
    """An `InferenceSession` behind the engine interface; safe to call from several threads."""

    def __init__(self, path: Path, *, threads: int = 0) -> None:
        self._session = session(path, threads=threads)
        self._inputs = {value.name: value.type for value in self._session.get_inputs()}
        self._outputs = [value.name for value in self._session.get_outputs()]

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        # The exporter drops inputs that a graph does not use (the tokens of an encoder without image prompts, say).
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
