"""Graph -> `torch.export` program, from which ONNX files and AOTInductor's packages are made."""

from __future__ import annotations

from collections.abc import Collection

import torch

from imprompt_export.graphs import Axes, Graph
from imprompt_export.precision import Positional


def trace_axes(graph: Graph) -> Axes:
    """Example sizes for tracing: the last check, which has no axis of size 1 (`torch.export` would freeze it)."""
    return graph.checks[-1]


def trace(
    graph: Graph, dtype: torch.dtype, *, axes: Axes | None = None, exact: Collection[str] = (), device: str = "cpu"
) -> torch.export.ExportedProgram:
    """Trace `graph`, computed in `dtype`; the caller has cast its weights, which the program refers to.

    Args:
        axes: example sizes, by default `trace_axes`.
        exact: axes that keep the size of the example; the others stay dynamic.
        device: where the weights are.
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
    with torch.no_grad():
        return torch.export.export(
            Positional(graph, dtype).eval(),
            tuple(tensor.to(device) for tensor in example.values()),
            dynamic_shapes={"tensors": dynamic},
            strict=False,
        )
