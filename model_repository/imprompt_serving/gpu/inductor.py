"""Run AOTInductor packages on torch tensors: weights are on the GPU once, and each shape has a CUDA graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from imprompt_serving.backends.inductor import WEIGHTS, EngineInfo, load_packages
from imprompt_serving.gpu.cuda_graphs import GraphedEngine, PreparedCall, on_stream
from imprompt_serving.gpu.loras import LoraWeights


class InductorDeviceEngine(GraphedEngine):
    """AOTInductor packages on one GPU.

    Packages and CUDA graphs hold pointers to the weights, so weights may be replaced in place between calls.
    """

    def __init__(self, file: Path, info: EngineInfo, *, device: str) -> None:
        super().__init__(file, info.inputs, torch.device(device))
        self._info = info
        self._weights = {name: self._to_device(w) for name, w in load_file(file.with_suffix(WEIGHTS)).items()}
        self._packages = load_packages(file, info, self._weights, self._device.index or 0)
        self._loras = LoraWeights(file, self._weights, lambda name: self._weights[name].clone())

    def use_loras(self, scales: Mapping[str, float]) -> None:
        """Run the next calls with LoRAs of these scales. The stream completes earlier calls first."""
        with self._lock, torch.cuda.device(self._device), on_stream(self._stream, ()):
            self._loras.use(scales)

    def _prepare(self, given: Mapping[str, Tensor]) -> PreparedCall:
        axes = self._info.axes_of({name: tuple(tensor.shape) for name, tensor in given.items()})
        package: Any = self._packages[self._info.package_for(axes)]
        typed = self._info.select_inputs(given)
        inputs = {name: torch.empty(t.shape, dtype=t.dtype, device=self._device) for name, t in typed.items()}
        for name, tensor in typed.items():
            inputs[name].copy_(tensor)
        outputs = dict(zip(self._info.outputs, package(*inputs.values()), strict=True))

        def launch() -> None:
            for output, value in zip(outputs.values(), package(*inputs.values()), strict=True):
                output.copy_(value)

        return PreparedCall(inputs=inputs, outputs=outputs, launch=self._captured(launch))

    def _to_device(self, weight: Tensor) -> Tensor:
        """Copy a weight to the GPU, in the memory format that the packages were compiled for."""
        on_device = weight.to(self._device)
        if self._info.channels_last and weight.ndim == 4:
            return on_device.contiguous(memory_format=torch.channels_last)
        return on_device
