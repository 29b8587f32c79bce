"""Typed access to the tensors of a request, checked against `parameters`; every error names its parameter."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from imprompt_serving.errors import InvalidRequest, shown
from imprompt_serving.parameters import PARAMETERS, Type
from imprompt_serving.pipeline.images import file_bytes
from imprompt_serving.specs import Limits

_MAX_VALUES = 4096
"""Largest number of values of one parameter: far more than any request can use."""
_JSON_DEPTH = 8
_JSON_INTEGERS = range(-(2**63), 2**64)
"""Integers that `torch.Generator.manual_seed` accepts and that JSON messages between models can carry."""


class Reader:
    """The tensors of one request. Absent ones give the default; present ones must be in the range or among the choices.

    Defaults and bounds come from the parameter's row, unless they depend on the bundle or the task: then the caller
    passes them. `defaults` are those that the bundle file sets for single numbers, and come before both.
    """

    def __init__(
        self, tensors: Mapping[str, np.ndarray], limits: Limits, defaults: Mapping[str, float] | None = None
    ) -> None:
        self._tensors, self._limits, self._defaults = tensors, limits, defaults or {}
        self._pictures: dict[str, list[bytes]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def floats(self, name: str) -> np.ndarray:
        """Read a float tensor, as float32."""
        values = np.asarray(self._tensors[name])
        if values.dtype.kind != "f":
            raise InvalidRequest(name, f"must hold floats, got {values.dtype}")
        with np.errstate(over="ignore"):  # an overflow becomes infinite, which the caller refuses
            return values.astype(np.float32, copy=False)

    def count(self, name: str) -> int:
        """Return the number of byte strings."""
        return len(self._data(name))

    def pictures(self, name: str) -> list[bytes]:
        """Read picture files, which may come as base64 text or data URIs."""
        if name not in self._pictures:
            files = self._data(name)
            self._pictures[name] = [file_bytes(file, name, index, len(files)) for index, file in enumerate(files)]
        return self._pictures[name]

    def _data(self, name: str) -> list[bytes]:
        """Read byte strings."""
        if name not in self:
            return []
        values = self._tensors[name].ravel().tolist()
        if not all(isinstance(value, bytes) for value in values):
            raise InvalidRequest(name, f"must hold bytes, got {self._tensors[name].dtype}")
        return values

    def texts(self, name: str) -> tuple[str, ...]:
        """Read UTF-8 texts."""
        try:
            return tuple(value.decode() for value in self._data(name))
        except UnicodeDecodeError:
            raise InvalidRequest(name, "must be UTF-8 text") from None

    def text(self, name: str) -> str | None:
        return _single(name, self.texts(name)) if name in self else None

    def choice(self, name: str) -> str | None:
        row = PARAMETERS[name]
        return _allowed(name, self.text(name), row.choices) if name in self else row.default

    def choices(self, name: str) -> tuple[str, ...]:
        return tuple(_allowed(name, value, PARAMETERS[name].choices) for value in self.texts(name))

    def flag(self, name: str) -> bool:
        if name not in self:
            return bool(PARAMETERS[name].default)
        return bool(_single(name, self._values(name, "b", "booleans")))

    def integers(self, name: str) -> tuple[int, ...]:
        return tuple(self._values(name, "iu", "integers"))

    def integer(
        self, name: str, *, default: int | None = None, low: float | None = None, high: float | None = None
    ) -> int:
        row = PARAMETERS[name]
        if name not in self:
            return int(self._default(name, default))
        value = int(_single(name, self.integers(name)))
        low = row.low if low is None else low
        high = row.high if high is None else high
        if not low <= value <= high:
            raise InvalidRequest(name, f"must be {low:.0f} to {high:.0f}, got {value}")
        return value

    def pair(self, name: str) -> tuple[int, int] | None:
        if name not in self:
            default: tuple[int, int] | None = PARAMETERS[name].default
            return default
        values = self.integers(name)
        if len(values) != 2:
            raise InvalidRequest(name, f"takes two values, got {len(values)}")
        return values[0], values[1]

    def numbers(self, name: str) -> tuple[float, ...]:
        low, high = PARAMETERS[name].low, PARAMETERS[name].high
        values = tuple(float(value) for value in self._values(name, "iuf", "numbers"))
        for value in values:
            if not math.isfinite(value):
                raise InvalidRequest(name, f"must be finite, got {value}")
            if not low <= value <= high:
                raise InvalidRequest(name, f"must be {low:g} to {high:g}, got {value:g}")
        return values

    def number(self, name: str, *, default: float | None = None) -> float:
        if name in self:
            return float(_single(name, self.numbers(name)))
        return float(self._default(name, default))

    def _default(self, name: str, default: float | None) -> Any:
        return self._defaults.get(name, PARAMETERS[name].default if default is None else default)

    def one_or_each(self, name: str, count: int, what: str, *, default: Any = None) -> tuple[Any, ...]:
        """Expand a parameter with no value, one value, or `count` values to `count` values, one for each of `what`."""
        row = PARAMETERS[name]
        readers: dict[Type, Callable[[str], tuple[Any, ...]]] = {
            Type.TEXTS: self.texts,
            Type.CHOICES: self.choices,
            Type.NUMBERS: self.numbers,
        }
        return one_or_each(name, readers[row.type](name), count, row.default if default is None else default, what)

    def setting(self, name: str) -> Any:
        """Read a single value of any type."""
        readers: dict[Type, Callable[[str], Any]] = {
            Type.CHOICE: self.choice,
            Type.FLAG: self.flag,
            Type.INTEGER: self.integer,
            Type.NUMBER: self.number,
            Type.PAIR: self.pair,
            Type.TEXT: self.text,
        }
        return readers[PARAMETERS[name].type](name)

    def json(self, name: str) -> Any:
        """Parse a JSON parameter; None if absent.

        Refuses integers beyond 64 bits, strings that cannot be encoded, and more than `_JSON_DEPTH` levels.
        """
        text = self.text(name)
        if text is None:
            return None
        if len(text) > self._limits.json_characters:
            raise InvalidRequest(
                name, f"has {len(text)} characters; at most {self._limits.json_characters} are allowed"
            )
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise InvalidRequest(name, f"must be JSON: {error}") from None
        except (ValueError, RecursionError):  # Python's limits on digits and depth
            raise InvalidRequest(name, "must be JSON with shorter numbers or fewer levels") from None
        _check_json(name, value, _JSON_DEPTH)
        return value

    def _values(self, name: str, kinds: str, what: str) -> list[Any]:
        """Read the elements of a tensor whose dtype has one of numpy's `kinds`; empty if absent."""
        if name not in self:
            return []
        values = self._tensors[name].ravel()
        if values.dtype.kind not in kinds:
            raise InvalidRequest(name, f"must hold {what}, got {values.dtype}")
        if len(values) > _MAX_VALUES:
            raise InvalidRequest(name, f"takes at most {_MAX_VALUES} values, got {len(values)}")
        return list(values.tolist())


def _check_json(name: str, value: Any, depth: int) -> None:
    if isinstance(value, dict | list):
        if not depth:
            raise InvalidRequest(name, f"is nested more than {_JSON_DEPTH} levels deep")
        for part in (*value, *value.values()) if isinstance(value, dict) else value:
            _check_json(name, part, depth - 1)
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidRequest(name, f"{shown(value)} is not valid Unicode") from None
    elif isinstance(value, int) and value not in _JSON_INTEGERS:
        raise InvalidRequest(name, "contains an integer of more than 64 bits")


def one_or_each(parameter: str, values: tuple[Any, ...], count: int, default: Any, what: str) -> tuple[Any, ...]:
    """Expand no value (giving `default`), one value, or `count` values to `count` values, one for each of `what`."""
    if len(values) not in (0, 1, count):
        raise InvalidRequest(parameter, f"expected one value, or one for each of the {count} {what}; got {len(values)}")
    return values if len(values) == count else (values or (default,)) * count


def _single(name: str, values: Any) -> Any:
    if len(values) != 1:
        raise InvalidRequest(name, f"takes one value, got {len(values)}")
    return values[0]


def _allowed(name: str, value: str | None, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise InvalidRequest(name, f"{shown(value)} is not one of {', '.join(allowed)}")
    return value
