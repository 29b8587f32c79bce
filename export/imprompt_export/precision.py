"""Graphs in the types that their engines compute in, with inputs and outputs that stay as they are.

Tensors between models are float32 whatever the precision: casts are the first and the last thing that a graph does, and
compilers fuse them with what is next to them. The types are those of the graph, because strongly typed compilers
(TensorRT 11, TensorRT-RTX) take them from there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from imprompt_export.graphs import EXACT_BUFFERS, Graph

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float32}
"""What graphs are traced in; int8 engines are quantized afterwards."""
TOLERANCE = {"fp32": 1.0, "fp16": 16.0, "bf16": 128.0, "int8": 1.0}
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
        inputs = {
            spec.name: tensor.to(self._dtype) if tensor.is_floating_point() and not spec.exact else tensor
            for spec, tensor in zip(self._graph.inputs, tensors, strict=True)
        }
        return tuple(out.float() if out.is_floating_point() else out for out in self._graph.run(inputs))


@contextlib.contextmanager
def cast(module: nn.Module, dtype: torch.dtype, device: str = "cpu", *, channels_last: bool = False) -> Iterator[None]:
    """The weights of `module` in `dtype` on `device`, for the time being.

    Args:
        channels_last: whether those of convolutions lie in this order.
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
