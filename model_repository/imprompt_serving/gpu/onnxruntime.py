"""Run ONNX Runtime on torch tensors with IOBinding: tensors stay on the device, and the host does not wait."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from imprompt_serving.backends.onnxruntime import check_cuda, session
from imprompt_serving.gpu import call_shapes, to_array
from imprompt_serving.gpu.cuda_graphs import on_stream
from imprompt_serving.gpu.lru_cache import LRUCache

SHAPES = 64
"""The number of input shapes whose output shapes are cached."""
_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(uint8)": torch.uint8,
    "tensor(int64)": torch.int64,
    "tensor(bool)": torch.bool,
}
_ELEMENT_TYPES = {
    torch.float32: 1,
    torch.uint8: 2,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.bfloat16: 16,
}
"""The numbers of types in ONNX (`onnx.TensorProto.DataType`); numpy types would do, but numpy has no bf16."""


class OnnxRuntimeDeviceEngine:
    """A session with inputs and outputs as torch tensors on `device` (`cuda:0`, or `cpu`).

    The session has its own stream. The caller's stream waits for it, the host does not.

    Raises:
        EngineError: ONNX Runtime cannot use the GPU.
    """

    def __init__(self, path: Path, device: str) -> None:
        self._device = torch.device(device)
        if self._device.type == "cuda":
            check_cuda()
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        stream = self._stream.cuda_stream if self._stream else 0
        self._session = session(path, gpu=self._device.index or 0, stream=stream)
        self._options = onnxruntime.RunOptions()
        # Otherwise each call waits for the stream (https://github.com/microsoft/onnxruntime/issues/28539).
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._inputs = {value.name: _TYPES[value.type] for value in self._session.get_inputs()}
        self._outputs = {value.name: _TYPES[value.type] for value in self._session.get_outputs()}
        self._shapes: LRUCache[list[tuple[int, ...]]] = LRUCache(SHAPES)
        self._lock = threading.Lock()

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        given = {name: torch.from_numpy(value).to(self._device) for name, value in tensors.items()}
        return {name: to_array(value) for name, value in self.run_tensors(given).items()}

    def run_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one call. torch allocates the outputs; their shapes come from an earlier call with equal input shapes."""
        given = {
            name: tensor.to(self._inputs[name]).contiguous() for name, tensor in tensors.items() if name in self._inputs
        }
        ordered = on_stream(self._stream, given.values()) if self._stream else contextlib.nullcontext(list[Tensor]())
        with self._lock, ordered as answers:
            shapes = self._shapes.get(call_shapes(given), lambda: self._run_once(given))
            answer = {
                name: torch.empty(shape, dtype=dtype, device=self._device)
                for (name, dtype), shape in zip(self._outputs.items(), shapes, strict=True)
            }
            answers += answer.values()
            binding = self._bound(given)
            for name, tensor in answer.items():
                binding.bind_output(name, *self._binding_arguments(tensor))
            self._session.run_with_iobinding(binding, self._options)
        return answer

    def _run_once(self, given: Mapping[str, Tensor]) -> list[tuple[int, ...]]:
        """Run one call to learn the shapes of the outputs, which only the engine knows."""
        binding = self._bound(given)
        for name in self._outputs:
            binding.bind_output(name, self._device.type, self._device.index or 0)
        self._session.run_with_iobinding(binding, self._options)
        if self._stream:
            self._stream.synchronize()  # ONNX Runtime owns these outputs, and frees them with the binding
        return [tuple(value.shape()) for value in binding.get_outputs()]

    def _bound(self, given: Mapping[str, Tensor]) -> Any:
        binding = self._session.io_binding()
        for name, tensor in given.items():
            binding.bind_input(name, *self._binding_arguments(tensor))
        return binding

    def _binding_arguments(self, tensor: Tensor) -> tuple[str, int, int, tuple[int, ...], int]:
        element = _ELEMENT_TYPES[tensor.dtype]
        return self._device.type, self._device.index or 0, element, tuple(tensor.shape), tensor.data_ptr()
