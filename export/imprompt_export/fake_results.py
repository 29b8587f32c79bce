"""Shapes and strides of results while tracing, for operators for which torch derives them slowly.

`torch.export` runs a graph with fake tensors, whose sizes are symbols. A norm is then a dozen operations that each
multiply and compare sizes, and a view searches for the axes to join and to split. With these rules, tracing a UNet
takes less than half of the time, and the program is the same (`pytest tests/export/test_fake_results.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch._dynamo.config
import torch.fx.config
from torch import Tensor
from torch._prims_common import infer_size, is_contiguous_or_false, make_contiguous_strides_for
from torch._subclasses import fake_impls

_aten = torch.ops.aten


@contextmanager
def fast_tracing() -> Iterator[None]:
    """Let torch use the rules of this module while it traces, and not record a stack trace for each operator."""
    with (
        mock.patch.dict(fake_impls.FAST_OP_IMPLEMENTATIONS, _RULES),
        mock.patch.object(torch.fx.config, "do_not_emit_stack_traces", True),
        # The cache of fake tensors only costs time: its keys hold symbolic sizes, of which no two calls have the same.
        torch._dynamo.config.patch(fake_tensor_cache_enabled=False),
    ):
        yield


def _group_norm(
    mode: Any, x: Tensor, weight: Any, bias: Any, n: Any, c: Any, pixels: Any, groups: int, eps: float
) -> Any:
    with mode:
        statistics = x.new_empty((n, groups))
        return torch.empty_like(x), statistics, statistics


def _layer_norm(mode: Any, x: Tensor, normalized: Any, weight: Any, bias: Any, eps: float) -> Any:
    with mode:
        kept = x.shape[: x.dim() - len(normalized)]
        statistics = x.new_empty((*kept, *(1 for _ in normalized)))
        return torch.empty_like(x, memory_format=torch.contiguous_format), statistics, statistics


def _mm(mode: Any, one: Tensor, other: Tensor) -> Tensor:
    with mode:
        return one.new_empty((one.shape[0], other.shape[1]))


def _addmm(mode: Any, added: Any, one: Tensor, other: Tensor, **factors: Any) -> Tensor:
    return _mm(mode, one, other)


def _view(mode: Any, x: Any, shape: Any) -> Any:
    if is_contiguous_or_false(x):
        sizes = infer_size(shape, x.numel())
        with mode:
            return x.as_strided(sizes, make_contiguous_strides_for(sizes))
    return fake_impls._view_meta(mode, _aten.view.default, x, shape)


_RULES = {
    _aten.view.default: _view,
    _aten._unsafe_view.default: _view,
    _aten.native_group_norm.default: _group_norm,
    _aten.native_layer_norm.default: _layer_norm,
    _aten.mm.default: _mm,
    _aten.addmm.default: _addmm,
}
