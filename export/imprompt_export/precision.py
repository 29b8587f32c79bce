"""Graphs in the types that their engines compute in, with inputs and outputs that stay as they are.

Tensors between models are float32 whatever the precision: casts are the first and the last thing that a graph does, and
compilers fuse them with what is next to them. Only tensors that never leave the denoiser (`Graph.internal`) have the
type of the graph. The types are those of the graph, because strongly typed compilers (TensorRT 11, TensorRT-RTX) take
them from there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from imprompt_export.graphs import Graph
from imprompt_serving.denoiser.precision import DTYPES

TOLERANCE = {"fp32": 1.0, "fp16": 16.0, "bf16": 128.0, "int8": 1.0, "fp8": 256.0}
"""By how much a graph's tolerance grows. Measured on the test bundles in fp16: six times; bf16 has three bits less."""


def dtype_of(graph: Graph, precision: str) -> torch.dtype:
    """The type that ``graph`` computes in."""
    return DTYPES[graph.precision(precision)]


class Positional(nn.Module):
    """A graph that computes in ``dtype``, as a module of positional tensors, which is what ``torch.export`` takes."""

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
    """The weights of `module` in `dtype` on `device`, for the time being.

    Args:
        channels_last: whether those of convolutions lie in this order.
    """
    tensors = [*module.parameters(), *module.buffers()]
    originals = [tensor.data for tensor in tensors]
    for tensor in tensors:
        order = torch.channels_last if channels_last and tensor.ndim == 4 else torch.preserve_format
        as_type = dtype if tensor.is_floating_point() else tensor.dtype
        tensor.data = tensor.data.to(device, as_type, memory_format=order)
    try:
        yield
    finally:
        for tensor, original in zip(tensors, originals, strict=True):
            tensor.data = original
