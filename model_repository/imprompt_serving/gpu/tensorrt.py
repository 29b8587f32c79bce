"""Run TensorRT and TensorRT-RTX engines on torch tensors: each has its own stream, and each shape a CUDA graph."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imprompt_serving.backends import EngineError
from imprompt_serving.backends.files import write_atomically
from imprompt_serving.backends.tensorrt import EngineInfo, TensorRT, refuse_data_center_gpu
from imprompt_serving.gpu import CallShapes, call_shapes, to_array
from imprompt_serving.gpu.lru_cache import LRUCache

logger = logging.getLogger(__name__)

GRAPHS = 16
"""The number of shapes whose buffers and CUDA graphs are kept: picture sizes in use, times numbers of rows."""
ProfileLimits = Mapping[str, tuple[Sequence[int], Sequence[int]]]
"""The smallest and the largest shape of each input in one profile."""
PREPARING = threading.Lock()
"""Several threads may run engines, but a process can only capture one CUDA graph at a time."""


def profile_for(shapes: CallShapes, profiles: Sequence[ProfileLimits]) -> int:
    """Return the index of the first of `profiles` that accepts inputs of `shapes`.

    Raises:
        EngineError: no profile does; the message names the input that fits the fewest profiles.
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


@contextlib.contextmanager
def capturing() -> Iterator[torch.cuda.CUDAGraph]:
    """Capture what is launched on the current stream as a CUDA graph.

    `torch.cuda.graph` first waits for the whole device, which is an error while another thread captures.

    Raises:
        RuntimeError: something was launched that cannot be captured.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    graph.capture_begin(pool, capture_error_mode="thread_local")
    try:
        yield graph
    finally:
        try:
            graph.capture_end()
        except RuntimeError:
            # Otherwise torch would assume that the capture continues, and never reuse memory that two streams used.
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            raise


class _Call:
    """Buffers and an execution context for one shape, and a function that runs the engine on them."""

    def __init__(
        self, inputs: dict[str, Tensor], outputs: dict[str, Tensor], context: Any, launch: Callable[[], None]
    ) -> None:
        self.inputs, self.outputs, self.context, self.launch = inputs, outputs, context, launch


class TensorRTEngine:
    """An engine on one GPU. A lock serializes calls from several threads.

    The engine has its own stream. The caller's stream waits for it, the host does not. Each shape has its own execution
    context, because CUDA graphs must not share one (https://github.com/NVIDIA/TensorRT/issues/3798). As calls never
    overlap, all contexts share the same memory.
    """

    def __init__(self, path: Path, backend: TensorRT, *, device: str = "cuda") -> None:
        if not torch.cuda.is_available():
            raise EngineError(
                f"{path.name} is an engine of {backend.name}, which needs an NVIDIA GPU; this machine has none"
            )
        self._trt = trt = backend.package()
        EngineInfo.check(path, trt.__version__)
        self._device = torch.device(device)
        if backend.finishes_on_gpu:
            refuse_data_center_gpu("SM{}{}".format(*torch.cuda.get_device_capability(self._device)))
        with torch.cuda.device(self._device):
            self._logger = trt.Logger(trt.Logger.ERROR)
            self._runtime = trt.Runtime(self._logger)
            self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
            if self._engine is None:
                raise EngineError(f"{backend.name} {trt.__version__} cannot load {path.name}; see its message above")
            self._stream = torch.cuda.Stream(self._device)
            with torch.cuda.stream(self._stream):
                size = self._engine.device_memory_size_v2  # of the largest profile
                self._memory = torch.empty(size, dtype=torch.uint8, device=self._device)
            self._path, self._rtx = path, backend.finishes_on_gpu
            self._capturable = not self._rtx  # TensorRT-RTX captures by itself
            given = trt.ExecutionContextAllocationStrategy.USER_MANAGED
            self._contexts = self._rtx_config(given) if self._rtx else given
            """How contexts are created: they use memory that this class gives them."""
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        is_input = {name: self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        types = {name: _torch_type(trt, self._engine.get_tensor_dtype(name)) for name in names}
        self._inputs = {name: kind for name, kind in types.items() if is_input[name]}
        self._outputs = {name: kind for name, kind in types.items() if not is_input[name]}
        self._profiles = [self._limits(index) for index in range(self._engine.num_optimization_profiles)]
        self._calls: LRUCache[_Call] = LRUCache(GRAPHS, before_dropping=self._stream.synchronize)
        self._lock = threading.Lock()

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        given = {name: torch.from_numpy(value).to(self._device) for name, value in tensors.items()}
        return {name: to_array(value) for name, value in self.run_tensors(given).items()}

    def run_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # The exporter drops inputs that the graph does not use.
        given = {name: tensors[name] for name in self._inputs}
        with self._lock, torch.cuda.device(self._device):
            key = call_shapes(given)
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                call = self._calls.get(key, lambda: self._prepare(key, given))
                for name, tensor in given.items():
                    call.inputs[name].copy_(tensor, non_blocking=True)
                call.launch()
                answer = {name: tensor.clone() for name, tensor in call.outputs.items()}
            caller = torch.cuda.current_stream()
            caller.wait_stream(self._stream)
            # Otherwise torch could reuse the memory once the allocating stream is done with it.
            for tensor in answer.values():
                tensor.record_stream(caller)
            for tensor in given.values():
                if tensor.is_cuda:
                    tensor.record_stream(self._stream)
        return answer

    def _prepare(self, key: CallShapes, given: Mapping[str, Tensor]) -> _Call:
        """Allocate buffers and a context for inputs of shapes `key`, and run once, so that TensorRT allocates too."""
        with PREPARING:
            context = self._context(key)
            inputs = {n: torch.empty(t.shape, dtype=self._inputs[n], device=self._device) for n, t in given.items()}
            for name, tensor in given.items():
                inputs[name].copy_(tensor)
            outputs = {
                name: torch.empty(tuple(context.get_tensor_shape(name)), dtype=dtype, device=self._device)
                for name, dtype in self._outputs.items()
            }
            for name, tensor in (*inputs.items(), *outputs.items()):
                self._check(context.set_tensor_address(name, tensor.data_ptr()), f"memory for {name}")
            launch = partial(_enqueue, context, self._stream)
            launch()
            if self._rtx:
                self._save_kernels()
            return _Call(inputs, outputs, context, self._captured(launch))

    def _context(self, key: CallShapes) -> Any:
        """Create an execution context for inputs of shapes `key`."""
        profile = profile_for(key, self._profiles)
        context = self._engine.create_execution_context(self._contexts)
        if context is None:
            raise EngineError(f"{self._path.name} cannot run another shape; see TensorRT's message above")
        context.set_device_memory(self._memory.data_ptr(), self._memory.numel())
        if context.active_optimization_profile != profile:
            done = context.set_optimization_profile_async(profile, self._stream.cuda_stream)
            self._check(done, f"optimization profile {profile}")
        for name, shape in key:
            self._check(context.set_input_shape(name, shape), f"{name} of {list(shape)}")
        return context

    def _check(self, done: bool, what: str) -> None:
        """Raise if TensorRT refused a setting, which it reports by a return value instead of an exception."""
        if not done:
            raise EngineError(f"{self._path.name} refused {what}; see TensorRT's message above")

    def _captured(self, launch: Callable[[], None]) -> Callable[[], None]:
        """Capture `launch` as a CUDA graph, or return it unchanged if this engine cannot be captured."""
        if not self._capturable:
            return launch
        self._stream.synchronize()
        try:
            with capturing() as graph:
                launch()
        except RuntimeError as error:
            self._capturable = False
            logger.warning("%s runs without CUDA graphs: %s", self._path, error)
            return launch
        return graph.replay

    def _limits(self, profile: int) -> ProfileLimits:
        ranges = {name: self._engine.get_tensor_profile_shape(name, profile) for name in self._inputs}
        return {name: (tuple(low), tuple(high)) for name, (low, _, high) in ranges.items()}

    def _rtx_config(self, given: Any) -> Any:
        """Configure contexts that capture CUDA graphs themselves, and share kernels, also with earlier processes."""
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(given)
        # Compile kernels at the first call of a shape, not in the background of later calls.
        eager = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.dynamic_shapes_kernel_specialization_strategy = eager
        config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._kernels = config.create_runtime_cache()
        self._kernels_file = self._path.with_suffix(".kernels")
        if self._kernels_file.exists():
            self._kernels.deserialize(self._kernels_file.read_bytes())  # returns False if they are for another GPU
        self._check(config.set_runtime_cache(self._kernels), "a cache of kernels")
        return config

    def _save_kernels(self) -> None:
        """Save the kernels that were compiled for this GPU, for the next start, unless the repository is read-only.

        Servers may share a repository, and one may start while another saves.
        """
        with contextlib.suppress(OSError):
            write_atomically(self._kernels_file, bytes(self._kernels.serialize()))


def _enqueue(context: Any, stream: torch.cuda.Stream) -> None:
    if not context.execute_async_v3(stream.cuda_stream):
        raise EngineError("the engine failed; see TensorRT's message above")


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
