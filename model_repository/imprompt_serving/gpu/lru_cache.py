"""A bounded cache for what engines make per shape."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class LRUCache(Generic[Value]):
    """Keeps the `limit` most recently used values, and makes others again when needed.

    Args:
        before_dropping: called before a value is dropped, to wait for a device that may still be using it.
    """

    def __init__(self, limit: int, before_dropping: Callable[[], None] = lambda: None) -> None:
        self._limit, self._before_dropping = limit, before_dropping
        self._values: OrderedDict[Hashable, Value] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Return the value of `key`, calling `make` if it is missing."""
        if key not in self._values:
            while len(self._values) >= self._limit:  # before `make`, which may need the memory
                self._before_dropping()
                self._values.popitem(last=False)
            self._values[key] = make()
        self._values.move_to_end(key)
        return self._values[key]
