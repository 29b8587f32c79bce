"""Compare each engine with PyTorch after the export."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor

from imprompt_export.graphs import Axes, Graph
from imprompt_export.precision import TOLERANCE
from imprompt_serving.backends import get_backend

LEVELS = {"fp16": 2.0, "bf16": 12.0}
"""Largest difference of a picture from PyTorch's in these precisions, in levels of 255; in others a graph's tolerance.

SD 1.5's VAE differs by 7 in bf16, with random weights, and the embedded bundle's by 5.
"""


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """One comparison with PyTorch: sizes, seconds of the engine's call, largest difference, and largest allowed one."""

    engine: str
    sizes: dict[str, float]
    seconds: float
    difference: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.allowed


class ParityError(RuntimeError):
    """The results of an exported engine differ from PyTorch's by more than is allowed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """Outputs of a graph in PyTorch (in float32), with the sizes and the inputs that they belong to."""

    sizes: Axes
    inputs: dict[str, Tensor]
    outputs: tuple[Tensor, ...]


@torch.no_grad()
def references(graph: Graph, checks: Sequence[Axes] = ()) -> list[Reference]:
    """Run `graph` in PyTorch at the sizes `checks`; by default at those of the graph."""
    made = []
    for seed, axes in enumerate(checks or graph.checks):
        example = graph.example(axes, seed)
        made.append(Reference(sizes=axes, inputs=example, outputs=graph.run(example)))
    return made


def compare(
    graph: Graph, expected: Sequence[Reference], path: Path, backend: str, precision: str = "fp32"
) -> list[Comparison]:
    """Compare the engine at `path` with PyTorch.

    Args:
        graph: the graph of the engine; its weights are not needed anymore.
        expected: the `references` of the graph.
        path: the file of the engine.
        backend: the backend that runs it.
        precision: `engine.precision` of the bundle, which widens the tolerance.
    """
    engine = get_backend(backend).load(path)
    computed_in = graph.precision(precision)
    factor = TOLERANCE[computed_in]
    rows = []
    for reference in expected:
        start = time.perf_counter()
        answer = engine.run({name: tensor.numpy() for name, tensor in reference.inputs.items()})
        seconds = time.perf_counter() - start
        difference, allowed = 0.0, 0.0
        for name, value in zip(graph.outputs, reference.outputs, strict=True):
            floating = value.is_floating_point()
            scale = factor * float(value.abs().max()) if floating else LEVELS.get(computed_in, 1.0)
            difference = max(difference, _distance(value.numpy(), answer[name]))
            allowed = max(allowed, graph.tolerance * scale)
        rows.append(
            Comparison(
                engine=graph.name, sizes=reference.sizes, seconds=seconds, difference=difference, allowed=allowed
            )
        )
    return rows


def _distance(expected: np.ndarray, answer: np.ndarray) -> float:
    """Return the largest difference; infinity for NaN or for booleans that differ."""
    if expected.dtype == bool:
        return 0.0 if np.array_equal(expected, answer) else math.inf
    distance = float(np.abs(expected.astype(np.float64) - answer.astype(np.float64)).max())
    return math.inf if math.isnan(distance) else distance


def check_parity(rows: list[Comparison]) -> None:
    """Raise for the first comparison whose difference is larger than allowed.

    Raises:
        ParityError: names the engine, the sizes, and both differences.
    """
    for row in rows:
        if not row.passed:
            raise ParityError(
                f"{row.engine} at {row.sizes} differs from PyTorch by {row.difference:.2g} (allowed {row.allowed:.2g})"
            )
