"""Faster tracing gives the same programs as torch's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from imprompt_export.fake_results import fast_tracing


class Operators(nn.Module):
    """Every operator with a rule, for inputs with the strides that occur in UNets, VAEs, and transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.group = nn.GroupNorm(4, 8)
        self.plain_group = nn.GroupNorm(2, 8, affine=False)
        self.layer = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 12)
        self.without_bias = nn.Linear(8, 12, bias=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Take pictures [B, 8, height, width]."""
        results = []
        for picture in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3)):
            results += [self.group(picture), self.plain_group(picture)]
        tokens = x.flatten(2).transpose(1, 2)  # [B, height * width, 8]
        for sequence in (tokens, tokens.contiguous(), x.permute(0, 2, 3, 1)):
            results += [self.layer(sequence), functional.layer_norm(sequence, sequence.shape[-2:])]
            results += [self.linear(sequence), self.without_bias(sequence), self.linear(sequence[0])]
        heads = tokens.contiguous().unflatten(-1, (2, -1)).transpose(1, 2)  # [B, 2, height * width, 4]
        results += [heads.contiguous().view(-1, 4), heads.flatten(0, 1), x.view(-1), x.view(x.shape[0], -1, 2)]
        results += [heads.transpose(1, 2).flatten(2), x.transpose(0, 1).reshape(8, -1), x.view(x.shape)]
        results += [tokens.unflatten(-1, (2, -1)), x.transpose(0, 1).view(2, 4, *x.shape[:1], -1)]
        return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_programs_are_the_same(dtype: torch.dtype) -> None:
    fast, slow = nodes(dtype, fast_tracing()), nodes(dtype, contextlib.nullcontext())
    assert sum(len(found) for _, _, found in slow) > 100
    assert fast == slow


def nodes(dtype: torch.dtype, tracing: contextlib.AbstractContextManager[None]) -> list[tuple[Any, ...]]:
    """Trace `Operators`; return the name and operator of each node, and the type, shape, and strides of its results.

    Shapes and strides are those for several sizes of the picture, as the same number has several formulas.
    """
    auto = torch.export.Dim.AUTO
    with torch.no_grad(), tracing:
        program = torch.export.export(
            Operators().eval().to(dtype),
            (torch.zeros(2, 8, 6, 10, dtype=dtype),),
            dynamic_shapes=({0: auto, 2: auto, 3: auto},),
            strict=False,
        )
    (picture,) = (node.meta["val"] for node in program.graph.nodes if node.name == "x")
    symbols = [picture.shape[axis].node.expr for axis in (0, 2, 3)]
    return [
        (node.name, str(node.target), [*results(node.meta.get("val"), dict(zip(symbols, sizes, strict=True)))])
        for node in program.graph.nodes
        for sizes in ((2, 6, 10), (3, 5, 4))
    ]


def results(value: Any, sizes: dict[Any, int]) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for element in value:
            yield from results(element, sizes)
    elif isinstance(value, Tensor):
        yield value.dtype, *([number(size, sizes) for size in part] for part in (value.shape, value.stride()))


def number(size: Any, sizes: dict[Any, int]) -> int:
    return int(size if isinstance(size, int) else size.node.expr.subs(sizes))
