"""Interface through which the pipeline calls the other models of its bundle."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Protocol

import numpy as np

from imprompt_serving.errors import from_label

Tensors = dict[str, np.ndarray]


class Models(Protocol):
    """Calls models by name, with tensors by name."""

    async def call(self, model: str, tensors: Mapping[str, np.ndarray]) -> Tensors:
        """Return all outputs of an engine. (Triton's response cache ignores which outputs a request selects.)"""
        ...

    def stream(self, model: str, tensors: Mapping[str, np.ndarray]) -> AsyncIterator[Tensors]:
        """Yield the responses of a decoupled model."""
        ...


def raise_for_error(response: Tensors) -> None:
    """Raise the error in a response. It is a tensor because Triton turns every error between models into INTERNAL."""
    if "error" in response:
        label, message = (part.decode() for part in response["error"])
        raise from_label(label, message)


def strings(*values: str | bytes) -> np.ndarray:
    """Make a string tensor."""
    return np.array([value.encode() if isinstance(value, str) else value for value in values], dtype=object)
