"""How the pipeline reaches the other models of its bundle."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Protocol

import numpy as np

Tensors = dict[str, np.ndarray]


class Models(Protocol):
    """Calls by model name, tensors by name."""

    async def call(self, model: str, tensors: Mapping[str, np.ndarray]) -> Tensors:
        """All outputs of an engine. (Triton's response cache does not tell apart which ones a request asked for.)"""
        ...

    def stream(self, model: str, tensors: Mapping[str, np.ndarray]) -> AsyncIterator[Tensors]:
        """The answers of a decoupled model."""
        ...


def strings(*values: str | bytes) -> np.ndarray:
    """A string tensor."""
    return np.array([value.encode() if isinstance(value, str) else value for value in values], dtype=object)
