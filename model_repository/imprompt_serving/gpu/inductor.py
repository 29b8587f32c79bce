"""Run AOTInductor packages on torch tensors: weights are on the GPU once, and each shape has a CUDA graph."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from imprompt_serving.backends.inductor import WEIGHTS, EngineInfo, load_packages
from imprompt_serving.gpu import call_shapes, to_array
from imprompt_serving.gpu.loras import LoraWeights
from imprompt_serving.gpu.lru_cache import LRUCache
from imprompt_serving.gpu.tensorrt import GRAPHS, PREPARING, capturing

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Call:
    """Buffers for one shape, and a function that runs the package on them: with a CUDA graph, in a single launch."""

    inputs: dict[str, Tensor]
    outputs: list[Tensor]
    launch: Callable[[], None]


class InductorDeviceEngine:
    """AOTInductor packages on one GPU. A lock serializes calls from several threads.

    The engine has its own stream. The caller's stream waits for it, the host does not. Packages and CUDA graphs hold
    pointers to the weights, so weights may be replaced in place between calls.
    """

    def __init__(self, file: Path, info: EngineInfo, *, device: str) -> None:
        self._info, self._device, self._file = info, torch.device(device), file
        self._weights = {name: self._to_device(w) for name, w in load_file(file.with_suffix(WEIGHTS)).items()}
        self._packages = load_packages(file, info, self._weights, self._device.index or 0)
        self._loras = LoraWeights(file, self._weights, lambda name: self._weights[name].clone())
        with torch.cuda.device(self._device):
            self._stream = torch.cuda.Stream(self._device)
        self._capturable = True
        self._calls: LRUCache[_Call] = LRUCache(GRAPHS, before_dropping=self._stream.synchronize)
        self._lock = threading.Lock()

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        given = {name: torch.from_numpy(value).to(self._device) for name, value in tensors.items()}
        return {name: to_array(value) for name, value in self.run_tensors(given).items()}

    def use_loras(self, scales: Mapping[str, float]) -> None:
        """Run the next calls with LoRAs of these scales. The stream completes earlier calls first."""
        with self._lock, torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._loras.use(scales)

    def run_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        given = self._info.select_inputs(tensors)
        with self._lock, torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                call = self._calls.get(call_shapes(given), lambda: self._prepare(given))
                for name, tensor in given.items():
                    call.inputs[name].copy_(tensor, non_blocking=True)
                call.launch()
                answer = {name: tensor.clone() for name, tensor in zip(self._info.outputs, call.outputs, strict=True)}
            caller = torch.cuda.current_stream()
            caller.wait_stream(self._stream)
            # Otherwise torch could reuse the memory once the allocating stream is done with it.
            for tensor in answer.values():
                tensor.record_stream(caller)
            for tensor in given.values():
                if tensor.is_cuda:
                    tensor.record_stream(self._stream)
        return answer

    def _prepare(self, given: Mapping[str, Tensor]) -> _Call:
        """Allocate buffers for inputs of these shapes, and run once to load kernels, which cannot be captured."""
        axes = self._info.axes_of({name: tuple(tensor.shape) for name, tensor in given.items()})
        package: Any = self._packages[self._info.package_for(axes)]
        with PREPARING:
            inputs = {name: torch.empty(t.shape, dtype=t.dtype, device=self._device) for name, t in given.items()}
            for name, tensor in given.items():
                inputs[name].copy_(tensor)
            outputs = list(package(*inputs.values()))

            def launch() -> None:
                for output, value in zip(outputs, package(*inputs.values()), strict=True):
                    output.copy_(value)

            return _Call(inputs=inputs, outputs=outputs, launch=self._captured(launch))

    def _captured(self, launch: Callable[[], None]) -> Callable[[], None]:
        """Capture `launch` as a CUDA graph, or return it unchanged if these packages cannot be captured."""
        if not self._capturable:
            return launch
        self._stream.synchronize()
        try:
            with capturing() as graph:
                launch()
        except RuntimeError as error:
            self._capturable = False
            logger.warning("%s runs without CUDA graphs: %s", self._file, error)
            return launch
        return graph.replay

    def _to_device(self, weight: Tensor) -> Tensor:
        """Copy a weight to the GPU, in the memory format that the packages were compiled for."""
        on_device = weight.to(self._device)
        if self._info.channels_last and weight.ndim == 4:
            return on_device.contiguous(memory_format=torch.channels_last)
        return on_device
