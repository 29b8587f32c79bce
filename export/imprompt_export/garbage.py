"""When to collect garbage during an export: traced programs and engines hold weights in reference cycles.

By default Python collects according to the number of new objects. Tracing makes millions, so a tenth of the time of an
export would go into collections that free nothing.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

LARGE_GARBAGE = 256 * 2**20
"""Bytes of weights after which to collect: a collection takes most of a second, longer than building a small graph."""


@contextmanager
def rare_collections() -> Iterator[None]:
    """Let Python start hardly any collections of its own within the context."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, 20, 20)
    try:
        yield
    finally:
        gc.set_threshold(*before)
