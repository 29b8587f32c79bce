"""Compare each engine with PyTorch after export, and keep the table."""

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
"""Levels of 255 by which a picture may differ from PyTorch's, whatever the precision."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One comparison: sizes, seconds of the engine's call, largest difference to PyTorch and what is allowed."""

    engine: str
    sizes: dict[str, float]
    seconds: float
    difference: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.allowed


class ParityError(RuntimeError):
    """An exported engine does not compute what PyTorch does."""


def compare(graph: Graph, path: Path, backend: str, precision: str = "fp32", checks: Sequence[Axes] = ()) -> list[Row]:
    """Run ``graph`` in PyTorch (in float32) and ``path`` in its engine at every size of ``checks`` (or its own)."""
    engine = get_backend(backend).load(path)
    looser = TOLERANCE[graph.precision(precision)]
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
            scale = looser * float(value.abs().max()) if floating else min(looser, LEVELS)
            difference = max(difference, _distance(value.numpy(), answer[name]))
            allowed = max(allowed, graph.tolerance * scale)
        rows.append(Row(engine=graph.name, sizes=axes, seconds=seconds, difference=difference, allowed=allowed))
    return rows


def _distance(expected: np.ndarray, answer: np.ndarray) -> float:
    """The largest difference; infinite where one of both is not a number, or a yes is a no."""
    if expected.dtype == bool:
        return 0.0 if np.array_equal(expected, answer) else math.inf
    distance = float(np.abs(expected.astype(np.float64) - answer.astype(np.float64)).max())
    return math.inf if math.isnan(distance) else distance


def check(rows: list[Row]) -> None:
    """Raise for the first row whose difference is larger than its graph allows."""
    for row in rows:
        if not row.passed:
            raise ParityError(
                f"{row.engine} at {row.sizes} differs from PyTorch by {row.difference:.2g} (allowed {row.allowed:.2g})"
            )
