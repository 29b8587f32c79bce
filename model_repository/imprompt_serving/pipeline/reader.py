"""Typed access to the tensors of a request; every error names its parameter."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from imprompt_serving.errors import InvalidRequest


class Reader:
    """The tensors of one request. Optional ones that are absent give the default."""

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        self._tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def array(self, name: str) -> np.ndarray:
        return self._tensors[name]

    def data(self, name: str) -> list[bytes]:
        return [] if name not in self else [bytes(value) for value in self._tensors[name].ravel()]

    def texts(self, name: str) -> tuple[str, ...]:
        try:
            return tuple(value.decode() for value in self.data(name))
        except UnicodeDecodeError:
            raise InvalidRequest(name, "must be UTF-8 text") from None

    def text(self, name: str) -> str | None:
        return _single(name, self.texts(name)) if name in self else None

    def choice(self, name: str, allowed: tuple[str, ...], default: str) -> str:
        return _allowed(name, self.text(name) if name in self else default, allowed)

    def choices(self, name: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_allowed(name, value, allowed) for value in self.texts(name))

    def flag(self, name: str) -> bool:
        """Whether a boolean is given and true."""
        return name in self and bool(_single(name, self._tensors[name].ravel()))

    def integers(self, name: str) -> tuple[int, ...]:
        return tuple(int(value) for value in self._tensors[name].ravel()) if name in self else ()

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        if name not in self:
            return default
        value = int(_single(name, self.integers(name)))
        if not low <= value <= high:
            raise InvalidRequest(name, f"must be {low} to {high}, got {value}")
        return value

    def pair(self, name: str) -> tuple[int, int] | None:
        if name not in self:
            return None
        values = self.integers(name)
        if len(values) != 2:
            raise InvalidRequest(name, f"takes two values, got {len(values)}")
        return values[0], values[1]

    def numbers(self, name: str, low: float = -math.inf, high: float = math.inf) -> tuple[float, ...]:
        values = tuple(float(value) for value in self._tensors[name].ravel()) if name in self else ()
        for value in values:
            if not math.isfinite(value):
                raise InvalidRequest(name, f"must be finite, got {value}")
            if not low <= value <= high:
                raise InvalidRequest(name, f"must be {low:g} to {high:g}, got {value:g}")
        return values

    def number(self, name: str, default: float, low: float = -math.inf, high: float = math.inf) -> float:
        return float(_single(name, self.numbers(name, low, high))) if name in self else default

    def json(self, name: str, kind: type) -> Any:
        """A JSON text of ``kind`` (dict or list); None when absent."""
        text = self.text(name)
        if text is None:
            return None
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise InvalidRequest(name, f"must be JSON: {error}") from None
        if not isinstance(value, kind):
            raise InvalidRequest(name, f"must be a JSON {kind.__name__}, got {type(value).__name__}")
        return value


def spread(parameter: str, values: tuple[Any, ...], count: int, default: Any, what: str) -> tuple[Any, ...]:
    """``count`` values out of none, one for all, or one each."""
    if len(values) not in (0, 1, count):
        raise InvalidRequest(parameter, f"one for all, or one for each of {count} {what}; got {len(values)}")
    return values if len(values) == count else (values or (default,)) * count


def _single(name: str, values: Any) -> Any:
    if len(values) != 1:
        raise InvalidRequest(name, f"takes one value, got {len(values)}")
    return values[0]


def _allowed(name: str, value: str | None, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise InvalidRequest(name, f"{value!r} is none of {', '.join(allowed)}")
    return value
