"""Select cross-attention layers of diffusers UNets by block (`down_blocks.1.attentions.0...`)."""

from __future__ import annotations

from collections.abc import Sequence

from imprompt_serving.specs import CrossAttention


def last_down_block(layers: Sequence[CrossAttention]) -> frozenset[str]:
    """Name the layers of the last down block that has any."""
    return _block("down_blocks", max(_indices("down_blocks", layers), default=0), layers)


def first_up_block(layers: Sequence[CrossAttention]) -> frozenset[str]:
    """Name the layers of the first up block that has any."""
    return _block("up_blocks", min(_indices("up_blocks", layers), default=0), layers)


def _indices(blocks: str, layers: Sequence[CrossAttention]) -> list[int]:
    return [int(layer.name.split(".")[1]) for layer in layers if layer.name.startswith(f"{blocks}.")]


def _block(blocks: str, index: int, layers: Sequence[CrossAttention]) -> frozenset[str]:
    return frozenset(layer.name for layer in layers if layer.name.startswith(f"{blocks}.{index}."))
