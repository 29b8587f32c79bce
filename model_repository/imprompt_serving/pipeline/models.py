"""How the pipeline reaches the other models of its bundle."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Protocol

import numpy as np

from imprompt_serving.errors import from_status

Tensors = dict[str, np.ndarray]


class Models(Protocol):
    """Calls by model name, tensors by name."""

    async def call(self, model: str, tensors: Mapping[str, np.ndarray]) -> Tensors:
        """All outputs of an engine. (Triton's response cache does not tell apart which ones a request asked for.)"""
        ...

    def stream(self, model: str, tensors: Mapping[str, np.ndarray]) -> AsyncIterator[Tensors]:
        """The answers of a decoupled model."""
        ...


def raise_for_error(answer: Tensors) -> None:
    """Raise what a model answered as a tensor: between two models Triton makes every error an INTERNAL one."""
    if "error" in answer:
        status, message = (part.decode() for part in answer["error"])
        raise from_status(status, message)


def strings(*values: str | bytes) -> np.ndarray:
    """A string tensor."""
    return np.array([value.encode() if isinstance(value, str) else value for value in values], dtype=object)
