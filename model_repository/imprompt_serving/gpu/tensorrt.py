"""Run TensorRT and TensorRT-RTX engines on torch tensors: each has its own stream, and each shape a CUDA graph."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imprompt_serving.backends import EngineError
from imprompt_serving.backends.files import write_atomically
from imprompt_serving.backends.tensorrt import EngineInfo, TensorRT, refuse_data_center_gpu
from imprompt_serving.gpu import CallShapes, call_shapes
from imprompt_serving.gpu.cuda_graphs import GraphedEngine, PreparedCall

ProfileLimits = Mapping[str, tuple[Sequence[int], Sequence[int]]]
"""The smallest and the largest shape of each input in one profile."""


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


class TensorRTEngine(GraphedEngine):
    """An engine on one GPU.

    Each shape has its own execution context, because CUDA graphs must not share one
    (https://github.com/NVIDIA/TensorRT/issues/3798). As calls never overlap, all contexts share the same memory.
    """

    def __init__(self, path: Path, backend: TensorRT, *, device: str = "cuda") -> None:
        if not torch.cuda.is_available():
            raise EngineError(
                f"{path.name} is an engine of {backend.name}, which needs an NVIDIA GPU; this machine has none"
            )
        self._trt = trt = backend.package()
        EngineInfo.check(path, trt.__version__)
        on_device = torch.device(device)
        self._rtx = backend.finishes_on_gpu
        if self._rtx:
            refuse_data_center_gpu("SM{}{}".format(*torch.cuda.get_device_capability(on_device)))
        with torch.cuda.device(on_device):
            self._logger = trt.Logger(trt.Logger.ERROR)
            self._runtime = trt.Runtime(self._logger)
            self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise EngineError(f"{backend.name} {trt.__version__} cannot load {path.name}; see its message above")
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        is_input = {name: self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        types = {name: _torch_type(trt, self._engine.get_tensor_dtype(name)) for name in names}
        # The exporter drops inputs that the graph does not use.
        self._inputs = {name: kind for name, kind in types.items() if is_input[name]}
        self._outputs = {name: kind for name, kind in types.items() if not is_input[name]}
        self._profiles = [self._limits(index) for index in range(self._engine.num_optimization_profiles)]
        # TensorRT-RTX captures by itself.
        super().__init__(path, self._inputs, on_device, capturable=not self._rtx)
        with torch.cuda.device(on_device):
            with torch.cuda.stream(self._stream):
                size = self._engine.device_memory_size_v2  # of the largest profile
                self._memory = torch.empty(size, dtype=torch.uint8, device=on_device)
            given = trt.ExecutionContextAllocationStrategy.USER_MANAGED
            self._contexts = self._rtx_config(given) if self._rtx else given
            """How contexts are created: they use memory that this class gives them."""

    def _prepare(self, given: Mapping[str, Tensor]) -> PreparedCall:
        context = self._context(call_shapes(given))
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
        return PreparedCall(inputs=inputs, outputs=outputs, launch=self._captured(launch), context=context)

    def _context(self, key: CallShapes) -> Any:
        """Create an execution context for inputs of shapes `key`."""
        profile = profile_for(key, self._profiles)
        context = self._engine.create_execution_context(self._contexts)
        if context is None:
            raise EngineError(f"{self._file.name} cannot run another shape; see TensorRT's message above")
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
            raise EngineError(f"{self._file.name} refused {what}; see TensorRT's message above")

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
        self._kernels_file = self._file.with_suffix(".kernels")
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
