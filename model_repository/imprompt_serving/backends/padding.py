"""Pad and warm up engines that only run certain numbers of rows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from imprompt_serving.backends import Engine
from imprompt_serving.specs import CallRows


class PaddedEngine:
    """Pads the calls of an engine to `rows` by repeating the last row, and drops the outputs of the padding."""

    def __init__(self, engine: Engine, rows: CallRows) -> None:
        self._engine, self._rows = engine, rows

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows = len(next(iter(tensors.values())))
        missing = self._rows.padded(rows) - rows
        if not missing:
            return self._engine.run(tensors)
        padded = {name: np.concatenate([value, value[-1:].repeat(missing, 0)]) for name, value in tensors.items()}
        return {name: value[:rows] for name, value in self._engine.run(padded).items()}


def warm_up(engine: Engine, row: Mapping[str, np.ndarray], rows: CallRows) -> None:
    """Run `engine` once with each of its numbers of rows, by repeating `row`, which has one row of each input."""
    for count in rows.buckets:
        engine.run({name: value.repeat(count, 0) for name, value in row.items()})
