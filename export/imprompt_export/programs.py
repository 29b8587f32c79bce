"""Trace graphs to `torch.export` programs, from which ONNX files and AOTInductor packages are built."""

from __future__ import annotations

from collections.abc import Collection

import torch

from imprompt_export.fake_results import fast_tracing
from imprompt_export.graphs import Axes, Graph
from imprompt_export.precision import Positional


def trace_axes(graph: Graph) -> Axes:
    """Return the example sizes for tracing: the last check, whose axes are all above 1 (`torch.export` freezes 1)."""
    return graph.checks[-1]


def trace(
    graph: Graph, dtype: torch.dtype, *, axes: Axes | None = None, exact: Collection[str] = (), device: str = "cpu"
) -> torch.export.ExportedProgram:
    """Trace `graph` in `dtype`. The program refers to the graph's weights, which the caller has cast to `dtype`.

    Args:
        graph: the graph.
        dtype: the type that it computes in.
        axes: example sizes; by default `trace_axes`.
        exact: axes that are fixed to the size in the example; the others stay dynamic.
        device: the device of the weights.
    """
    example = {
        name: tensor.to(dtype) if name in graph.internal else tensor
        for name, tensor in graph.example(axes or trace_axes(graph)).items()
    }
    dynamic = tuple(
        {
            axis: torch.export.Dim.AUTO
            for axis, size in enumerate(tensor.shape)
            if isinstance(size, str) and size not in exact
        }
        for tensor in graph.inputs
    )
    with torch.no_grad(), fast_tracing():
        return torch.export.export(
            Positional(graph, dtype).eval(),
            tuple(tensor.to(device) for tensor in example.values()),
            dynamic_shapes={"tensors": dynamic},
            strict=False,
        )
