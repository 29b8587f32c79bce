"""Padding and warm-up, for engines that run few numbers of rows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from imprompt_serving.backends import Engine
from imprompt_serving.specs import CallRows


class PaddedEngine:
    """An engine whose calls are padded to `rows` by repeating their last row; its answers are cut again."""

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
    """Run `engine` once with each number of rows that it runs: `row` (one row of each input) so many times."""
    for count in rows.buckets:
        engine.run({name: value.repeat(count, 0) for name, value in row.items()})
