"""Compare each engine with PyTorch after the export."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch

from imprompt_export.graphs import Axes, Graph
from imprompt_export.precision import TOLERANCE
from imprompt_serving.backends import get_backend

LEVELS = 2.0
"""Largest difference of a picture from PyTorch's in any precision, in levels of 255."""


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


def compare(
    graph: Graph, path: Path, backend: str, precision: str = "fp32", checks: Sequence[Axes] = ()
) -> list[Comparison]:
    """Compare the engine at `path` with `graph` in PyTorch (in float32).

    Args:
        graph: the graph of the engine.
        path: the file of the engine.
        backend: the backend that runs it.
        precision: `engine.precision` of the bundle, which widens the tolerance.
        checks: the sizes at which to compare; by default those of `graph`.
    """
    engine = get_backend(backend).load(path)
    factor = TOLERANCE[graph.precision(precision)]
    rows = []
    for seed, axes in enumerate(checks or graph.checks):
        example = graph.example(axes, seed)
        with torch.no_grad():
            expected = graph.run(example)
        start = time.perf_counter()
        answer = engine.run({name: tensor.numpy() for name, tensor in example.items()})
        seconds = time.perf_counter() - start
        difference, allowed = 0.0, 0.0
        for name, value in zip(graph.outputs, expected, strict=True):
            floating = value.is_floating_point()
            scale = factor * float(value.abs().max()) if floating else min(factor, LEVELS)
            difference = max(difference, _distance(value.numpy(), answer[name]))
            allowed = max(allowed, graph.tolerance * scale)
        rows.append(Comparison(engine=graph.name, sizes=axes, seconds=seconds, difference=difference, allowed=allowed))
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
