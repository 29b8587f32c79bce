"""Make graphs compute in the precision of their engines, while inputs and outputs keep their types.

Tensors between models are float32 in every precision. A graph casts its inputs first and its outputs last, and
compilers fuse these casts with neighboring operators. Only tensors that never leave the denoiser (`Graph.internal`)
have the type of the graph. The types are part of the graph, because strongly typed compilers (TensorRT 11,
TensorRT-RTX) take them from it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from imprompt_export.graphs import EXACT_BUFFERS, Graph
from imprompt_serving.denoiser.precision import DTYPES

TOLERANCE = {"fp32": 1.0, "fp16": 16.0, "bf16": 256.0, "int8": 1.0, "fp8": 256.0}
"""Factor of a graph's tolerance, by precision.

In fp16 the test bundles need 6. bf16 has three bits fewer, and the image encoder of SD 1.5 needs 132 there.
"""


def dtype_of(graph: Graph, precision: str) -> torch.dtype:
    """Return the type that `graph` computes in."""
    return DTYPES[graph.precision(precision)]


class Positional(nn.Module):
    """A graph that computes in `dtype`, as a module with positional inputs, which `torch.export` needs."""

    def __init__(self, graph: Graph, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.module = graph.module
        self._graph, self._dtype = graph, dtype

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        graph = self._graph
        inputs = {
            spec.name: tensor.to(self._dtype) if spec.name in graph.cast_inputs else tensor
            for spec, tensor in zip(graph.inputs, tensors, strict=True)
        }
        outputs = zip(graph.outputs, graph.run(inputs), strict=True)
        return tuple(
            out.float() if out.is_floating_point() and name not in graph.internal else out for name, out in outputs
        )


@contextlib.contextmanager
def cast(module: nn.Module, dtype: torch.dtype, device: str = "cpu", *, channels_last: bool = False) -> Iterator[None]:
    """Temporarily convert the weights of `module` to `dtype` and move them to `device`.

    Args:
        module: the module; it has its original weights again at the end.
        dtype: the type of floating-point weights, except `EXACT_BUFFERS`.
        device: the device.
        channels_last: whether to store the weights of convolutions in channels-last order.
    """
    named = dict([*module.named_parameters(), *module.named_buffers()])
    tensors, originals = named.values(), [tensor.data for tensor in named.values()]
    for name, tensor in named.items():
        order = torch.channels_last if channels_last and tensor.ndim == 4 else torch.preserve_format
        as_type = dtype if tensor.is_floating_point() and name not in EXACT_BUFFERS else tensor.dtype
        tensor.data = tensor.data.to(device, as_type, memory_format=order)
    try:
        yield
    finally:
        for tensor, original in zip(tensors, originals, strict=True):
            tensor.data = original
