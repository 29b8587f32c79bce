"""Count torch's copies, and its waits for a GPU, without a GPU: `meta` tensors stand in for tensors on the GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COPIES = (
    "cat",
    "stack",
    "clone",
    "copy_",
    "_to_copy",
    "index",
    "index_put_",
    "index_select",
    "zeros",
    "zero_",
    "repeat",
)
"""Operators that write a tensor without computing anything."""
_READS = (
    torch.Tensor.item,
    torch.Tensor.__bool__,
    torch.Tensor.__float__,
    torch.Tensor.__int__,
    torch.Tensor.__index__,
    torch.Tensor.tolist,
)


class Traffic:
    """Context manager that records copies on any device, and waits for the fake GPU.

    torch waits for a GPU to read a tensor's value, for copies from and to the CPU unless they are `non_blocking`, for
    indices on the CPU, and for operators that check their result or its size.
    """

    def __init__(self) -> None:
        self.copies: Counter[str] = Counter()
        """Copies by operator."""
        self.bytes = 0
        """Bytes that these copies write."""
        self.waits: Counter[str] = Counter()
        """Waits by cause."""
        self._modes: tuple[Any, ...] = (_Reads(self), _Operators(self))

    def __enter__(self) -> Traffic:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, trace)


class _Reads(TorchFunctionMode):
    """Records what dispatch does not show: reads of values, which torch refuses for `meta`, and uploads of numbers."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self._traffic = traffic

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _READS and args[0].is_meta:
            self._traffic.waits["read"] += 1
            return True
        if func is torch.tensor and torch.device((kwargs or {}).get("device") or "cpu").type == "meta":
            self._traffic.waits["upload"] += 1
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and args[0].is_meta:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, list) for part in index):
                self._traffic.waits["index"] += 1
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self._traffic = traffic

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = any(tensor.is_meta for tensor in given)
        if there and name == "_linalg_check_errors":
            self._traffic.waits[name] += 1
            return None
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor):
            return result
        if name in COPIES:
            self._traffic.copies[name] += 1
            self._traffic.bytes += given[-1].nbytes if name == "index_put_" else result.nbytes
        if name in ("_to_copy", "copy_"):
            source, target = given[-1], result
            blocking = not kwargs.get("non_blocking", len(args) > 2 and args[2])
            if source.is_meta != target.is_meta and (blocking or source.is_meta):
                self._traffic.waits["download" if source.is_meta else "upload"] += 1
        elif there and name in ("index", "index_put_") and any(not tensor.is_meta for tensor in tree_leaves(args[1])):
            self._traffic.waits["index"] += 1
        elif there and name in ("nonzero", "masked_select", "unique"):
            self._traffic.waits[name] += 1
        return result
