"""Compute linear layers of transformer blocks in fp8 (e4m3), with scales from denoising runs of the bundle itself.

Weights and inputs have one scale per tensor. Everything that the diffusers example of NVIDIA's Model Optimizer keeps
in half precision (the embeddings of time and sizes, the first and last convolution, shortcuts) stays in half precision,
and so do all convolutions, the scores of attention, and the keys and values of prompts, whose first tokens are far
larger than the others.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from imprompt_export.calibration import HELD_OUT, RUNS, Arrays, CalibrationRunner, Calls, Recorder
from imprompt_export.checkpoints import Checkpoints
from imprompt_export.graphs import Graph
from imprompt_export.precision import cast
from imprompt_export.quality import Quality, measure, picture_distance, step_networks
from imprompt_serving.backends import Engine, get_backend
from imprompt_serving.specs import Bundle

_E4M3 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_E4M3).max
_SMALLEST = torch.finfo(torch.float16).tiny
"""Lower limit of the range of a tensor, so that scales of zero tensors are not zero."""
MARGIN = 2.0
"""Factor by which inputs may exceed those of calibration before they saturate; it costs e4m3 almost no precision."""
_MULTIPLE = 16
"""GPUs need weight sizes that are multiples of this (`torch._meta_registrations._check_scaled_mm_sizes`)."""
_LAYERS = re.compile(
    r".*transformer_blocks\.\d+\.(attn1\.to_(q|k|v)|attn1\.to_out\.0|attn2\.to_q|attn2\.to_out\.0|ff\.net\.0\.proj|ff\.net\.2)"
)


class Fp8Linear(nn.Module):
    """A linear layer with its weight in fp8, which casts its inputs to fp8 with a fixed scale.

    Scales are buffers, so that the machine code of packages does not depend on them.
    """

    def __init__(self, linear: nn.Linear, largest_input: float) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        weight_scale = weight.abs().amax().clamp_min(_SMALLEST) / _LARGEST
        input_scale = weight.new_tensor(MARGIN * max(largest_input, _SMALLEST) / _LARGEST)
        self.weight: Tensor
        self.weight_scale: Tensor
        self.input_scale: Tensor
        self.register_buffer("weight", _to_fp8(weight, weight_scale))
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("input_scale", input_scale)
        self.bias = linear.bias

    def forward(self, states: Tensor) -> Tensor:
        rows = _to_fp8(states.flatten(0, -2).float(), self.input_scale)
        answer = torch._scaled_mm(
            rows,
            self.weight.t(),
            scale_a=self.input_scale,
            scale_b=self.weight_scale,
            bias=self.bias,
            out_dtype=states.dtype,
            use_fast_accum=True,
        )
        return answer.unflatten(0, states.shape[:-1])


def _to_fp8(tensor: Tensor, scale: Tensor) -> Tensor:
    """Divide `tensor` by `scale` and cast it to fp8. Values beyond the range saturate instead of becoming NaN."""
    return (tensor / scale).clamp(-_LARGEST, _LARGEST).to(_E4M3)


def fp8_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """Return the layers of a network that can compute in fp8, by their names."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
        and _LAYERS.fullmatch(name)
        and layer.in_features % _MULTIPLE == layer.out_features % _MULTIPLE == 0
    }


@contextlib.contextmanager
def quantized(module: nn.Module, ranges: Mapping[str, float]) -> Iterator[None]:
    """Temporarily compute the layers in `ranges` (the largest input of each) in fp8."""
    originals = {name: module.get_submodule(name) for name in ranges}
    for name, layer in originals.items():
        assert isinstance(layer, nn.Linear)
        module.set_submodule(name, Fp8Linear(layer, ranges[name]))
    try:
        yield
    finally:
        for name, layer in originals.items():
            module.set_submodule(name, layer)


class TorchEngine:
    """A graph that PyTorch runs in float32 on `device`, where its weights are."""

    def __init__(self, graph: Graph, device: str) -> None:
        self._graph, self._device = graph, device

    def run(self, tensors: Arrays) -> dict[str, np.ndarray]:
        given = {spec.name: torch.from_numpy(tensors[spec.name]).to(self._device) for spec in self._graph.inputs}
        return {
            name: value.cpu().numpy() for name, value in zip(self._graph.outputs, self._graph.run(given), strict=True)
        }


@contextlib.contextmanager
def _on_device(graphs: Mapping[str, Graph], bundle: Bundle) -> Iterator[str]:
    """Temporarily move the networks of a step to the GPU if there is one, in float32; yield their device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with contextlib.ExitStack() as stack:
        for name in step_networks(bundle) if device != "cpu" else ():
            stack.enter_context(cast(graphs[name].module, torch.float32, device))
        yield device


@contextlib.contextmanager
def _watched(module: nn.Module, ranges: dict[str, float]) -> Iterator[None]:
    """Temporarily record the largest input of each layer that can compute in fp8 in `ranges`."""

    def watch(name: str, states: Tensor) -> None:
        ranges[name] = max(ranges.get(name, 0.0), float(states.abs().max()))

    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: watch(name, inputs[0]))
        for name, layer in fp8_layers(module).items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def calibrate(bundle: Bundle, checkpoints: Checkpoints, graphs: Sequence[Graph]) -> list[Graph]:
    """Return `graphs` with the ranges of their layers' inputs in denoising runs."""
    by_name = {graph.name: graph for graph in graphs}
    ranges: dict[str, dict[str, float]] = {name: {} for name in step_networks(bundle)}
    with _on_device(by_name, bundle) as device, contextlib.ExitStack() as watching:
        for name, found in ranges.items():
            watching.enter_context(_watched(by_name[name].module, found))
        _runner(bundle, checkpoints, by_name, device).pictures(RUNS)
    return [replace(graph, fp8_ranges=ranges.get(graph.name, {})) for graph in graphs]


def measure_quality(
    bundle: Bundle,
    checkpoints: Checkpoints,
    graphs: Mapping[str, Graph],
    files: Mapping[str, Path],
    min_snr_db: float,
) -> list[Quality]:
    """Measure the quality of the engines in `files` in a run that calibration did not see."""
    names = step_networks(bundle)
    calls = {name: Calls() for name in names}
    with _on_device(graphs, bundle) as device:
        recorders = {name: Recorder(TorchEngine(graphs[name], device), calls[name]) for name in names}
        prompt = _runner(bundle, checkpoints, graphs, device).pictures(RUNS[:1])
        runner = _runner(bundle, checkpoints, graphs, device, recorders)
        tensors = runner.encode(HELD_OUT, prompt)
        picture = runner.picture(HELD_OUT, tensors)
    # Recorders have no `run_tensors`, so engines on a GPU get arrays.
    engines = {name: Recorder(get_backend(bundle.backend).load(files[name]), Calls()) for name in names}
    other = _runner(bundle, checkpoints, graphs, "cpu", engines).picture(HELD_OUT, tensors)
    distance = picture_distance(other, picture)
    rows = [measure(name, "fp8", calls[name], engines[name], min_snr_db) for name in names]
    return [msgspec.structs.replace(row, picture_distance=distance) for row in rows]


def _runner(
    bundle: Bundle,
    checkpoints: Checkpoints,
    graphs: Mapping[str, Graph],
    device: str,
    engines: Mapping[str, Engine] = MappingProxyType({}),
) -> CalibrationRunner:
    """Return a runner with `engines`; networks that are not among them run in PyTorch in float32."""
    networks = step_networks(bundle)

    def engine(name: str) -> Engine:
        return engines.get(name) or TorchEngine(graphs[name], device if name in networks else "cpu")

    return CalibrationRunner(msgspec.structs.replace(bundle, precision="fp32"), checkpoints, engine)
