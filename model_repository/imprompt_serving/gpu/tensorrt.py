"""TensorRT and TensorRT-RTX engines on torch tensors: a stream of their own, and a CUDA graph for each shape."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imprompt_serving.engines import EngineError
from imprompt_serving.engines.tensorrt_package import EngineInfo, tensorrt
from imprompt_serving.gpu import Shapes, key_of
from imprompt_serving.gpu.recent import Recent

GRAPHS = 16
"""Shapes whose buffers and CUDA graphs are kept: sizes that are served, times rows of a call."""
Limits = Mapping[str, tuple[Sequence[int], Sequence[int]]]
"""Smallest and largest shape of each input in one profile."""


def profile_for(shapes: Shapes, profiles: Sequence[Limits]) -> int:
    """The first of ``profiles`` that takes inputs of ``shapes``.

    Raises:
        EngineError: none does; the message names the input that fits least often.
    """
    misfits: dict[str, int] = {}
    for index, limits in enumerate(profiles):
        outside = [name for name, shape in shapes if not _within(shape, *limits[name])]
        if not outside:
            return index
        misfits |= {name: misfits.get(name, 0) + 1 for name in outside}
    worst = max(misfits, key=lambda name: misfits[name])
    allowed = " or ".join(f"{list(limits[worst][0])} to {list(limits[worst][1])}" for limits in profiles)
    raise EngineError(f"the engine takes {worst} of {allowed}, not {list(dict(shapes)[worst])}; see [shapes]")


def _within(shape: Sequence[int], low: Sequence[int], high: Sequence[int]) -> bool:
    return len(shape) == len(low) and all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))


class _Call:
    """Buffers for one shape, and the work on them. Replaying it costs one launch for all of the engine's kernels."""

    def __init__(self, inputs: dict[str, Tensor], outputs: dict[str, Tensor], launch: Callable[[], None]) -> None:
        self.inputs, self.outputs, self.launch = inputs, outputs, launch


class TensorRTEngine:
    """An engine file on one GPU; calls from several threads take turns.

    All work is done on a stream of the engine's own; the caller's stream waits for it, the host does not.
    """

    def __init__(self, path: Path, backend: str, *, device: str = "cuda") -> None:
        if not torch.cuda.is_available():
            raise EngineError(f"{path.name} is an engine of {backend}, which needs an NVIDIA GPU; there is none here")
        self._trt = trt = tensorrt(backend)
        EngineInfo.check(path, trt.__version__)
        self._device = torch.device(device)
        with torch.cuda.device(self._device):
            self._logger = trt.Logger(trt.Logger.ERROR)
            self._runtime = trt.Runtime(self._logger)
            self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
            if self._engine is None:
                raise EngineError(f"{path.name} cannot be loaded by {backend} {trt.__version__}; see its message above")
            self._stream = torch.cuda.Stream(self._device)
            self._own_graphs = backend == "tensorrt_rtx"
            self._context = self._rtx_context(path) if self._own_graphs else self._engine.create_execution_context()
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        is_input = {name: self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        types = {name: _torch_type(trt, self._engine.get_tensor_dtype(name)) for name in names}
        self._inputs = {name: kind for name, kind in types.items() if is_input[name]}
        self._outputs = {name: kind for name, kind in types.items() if not is_input[name]}
        self._profiles = [self._limits(index) for index in range(self._engine.num_optimization_profiles)]
        self._calls: Recent[_Call] = Recent(GRAPHS)
        self._turn = threading.Lock()

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        given = {name: torch.from_numpy(value).to(self._device) for name, value in tensors.items()}
        return {name: value.cpu().numpy() for name, value in self.run_tensors(given).items()}

    def run_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # The exporter drops inputs that a graph does not use.
        given = {name: tensors[name] for name in self._inputs}
        with self._turn, torch.cuda.device(self._device):
            key = key_of(given)
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                call = self._calls.get(key, lambda: self._prepare(key, given))
                for name, tensor in given.items():
                    call.inputs[name].copy_(tensor, non_blocking=True)
                call.launch()
                answer = {name: tensor.clone() for name, tensor in call.outputs.items()}
            caller = torch.cuda.current_stream()
            caller.wait_stream(self._stream)
            # Memory is reused in the order of the stream that it was allocated on, unless told who else uses it.
            for tensor in answer.values():
                tensor.record_stream(caller)
            for tensor in given.values():
                if tensor.is_cuda:
                    tensor.record_stream(self._stream)
        return answer

    def _prepare(self, key: Shapes, given: Mapping[str, Tensor]) -> _Call:
        """Buffers for inputs of shapes ``key``; a first run, which allocates what it needs; and its CUDA graph."""
        inputs = {n: torch.empty(t.shape, dtype=self._inputs[n], device=self._device) for n, t in given.items()}
        for name, tensor in given.items():
            inputs[name].copy_(tensor)
        outputs = self._bind(key, inputs)
        self._enqueue()
        if self._own_graphs:
            self._keep_kernels()
            return _Call(inputs, outputs, lambda: self._rebind(key, inputs, outputs))
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._enqueue()
        return _Call(inputs, outputs, graph.replay)

    def _bind(self, key: Shapes, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tell the context shapes and addresses; returns the outputs, allocated."""
        self._shape(key)
        outputs = {
            name: torch.empty(tuple(self._context.get_tensor_shape(name)), dtype=dtype, device=self._device)
            for name, dtype in self._outputs.items()
        }
        for name, tensor in (*inputs.items(), *outputs.items()):
            self._context.set_tensor_address(name, tensor.data_ptr())
        return outputs

    def _shape(self, key: Shapes) -> None:
        profile = profile_for(key, self._profiles)
        if self._context.active_optimization_profile != profile:
            self._context.set_optimization_profile_async(profile, self._stream.cuda_stream)
        for name, shape in key:
            self._context.set_input_shape(name, shape)

    def _rebind(self, key: Shapes, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """TensorRT-RTX captures and keeps graphs by itself; it only has to know which buffers are meant."""
        self._shape(key)
        for name, tensor in (*inputs.items(), *outputs.items()):
            self._context.set_tensor_address(name, tensor.data_ptr())
        self._enqueue()

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise EngineError("the engine could not be run; see TensorRT's message above")

    def _limits(self, profile: int) -> Limits:
        ranges = {name: self._engine.get_tensor_profile_shape(name, profile) for name in self._inputs}
        return {name: (tuple(low), tuple(high)) for name, (low, _, high) in ranges.items()}

    def _rtx_context(self, path: Path) -> Any:
        """A context that captures CUDA graphs itself, with the kernels that an earlier process compiled."""
        config = self._engine.create_runtime_config()
        # At the first call of a shape, not behind the back of the next ones.
        eager = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.dynamic_shapes_kernel_specialization_strategy = eager
        config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._kernels = config.create_runtime_cache()
        self._kernels_file = path.with_suffix(".kernels")
        if self._kernels_file.exists():
            self._kernels.deserialize(self._kernels_file.read_bytes())
        config.set_runtime_cache(self._kernels)
        return self._engine.create_execution_context(config)

    def _keep_kernels(self) -> None:
        """Save what was compiled for this GPU, for the next start; not where the repository is read-only."""
        with contextlib.suppress(OSError):
            self._kernels_file.write_bytes(self._kernels.serialize())


def _torch_type(trt: Any, kind: Any) -> torch.dtype:
    types = {
        trt.float32: torch.float32,
        trt.float16: torch.float16,
        trt.bfloat16: torch.bfloat16,
        trt.int64: torch.int64,
        trt.int32: torch.int32,
        trt.uint8: torch.uint8,
        trt.bool: torch.bool,
    }
    return types[kind]
