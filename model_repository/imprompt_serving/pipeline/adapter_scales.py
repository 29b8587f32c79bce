"""Parse the scales of image prompts: by adapter, block, layer, and masked image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from imprompt_serving.errors import InvalidRequest, shown
from imprompt_serving.parameters import MAX_SCALE, PARAMETERS
from imprompt_serving.pipeline.reader import Reader, one_or_each
from imprompt_serving.specs import Adapter, Bundle


def parse_scales(read: Reader, bundle: Bundle, used: Sequence[Adapter]) -> tuple[Any, ...]:
    """Parse the scale of each adapter in use; a list may also have one scale per adapter of the bundle."""
    name = "ip_adapter_scale"
    if (config := f"{name}_config") in read:
        if name in read:
            raise InvalidRequest(name, f"cannot be combined with {config}")
        value = read.json(config)
        scales = tuple(value) if isinstance(value, list) else (value,)
        for scale in scales:
            _check_scale(config, scale, bundle)
    else:
        scales = read.numbers(name)
    if len(scales) not in (0, 1, len(used)) and len(scales) == len(bundle.adapters):
        by_name = dict(zip((adapter.name for adapter in bundle.adapters), scales, strict=True))
        return tuple(by_name[adapter.name] for adapter in used)
    return one_or_each(name, scales, len(used), PARAMETERS[name].default, "adapters in use")


def scale_leaves(scale: Any) -> Iterator[Any]:
    """Yield the innermost values of `scale`: they should be numbers, or lists with one number per masked image.

    A scale is one such value, or diffusers' nested dict of scales by part, block, and layer.
    """
    if not isinstance(scale, dict):
        yield scale
        return
    for blocks in scale.values():
        for block in blocks.values() if isinstance(blocks, dict) else [blocks]:
            yield from block if isinstance(block, list) else [block]


def _check_scale(parameter: str, scale: Any, bundle: Bundle) -> None:
    """Refuse values that are not numbers, and blocks and layers that the UNet does not have.

    Blocks without attention are ignored, as in diffusers.
    """
    for leaf in scale_leaves(scale):
        for value in leaf if isinstance(leaf, list) else [leaf]:
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_SCALE:
                expected = f"must be numbers from {-MAX_SCALE:g} to {MAX_SCALE:g}"
                raise InvalidRequest(parameter, f"{expected}, by block or per masked image; got {shown(value)}")
    known = [f"block_{index}" for index in range(max(bundle.levels) + 1)]
    for part, blocks in scale.items() if isinstance(scale, dict) else ():
        unknown = [f"{part}.{block}" for block in (blocks if isinstance(blocks, dict) else ()) if block not in known]
        if part not in ("down", "mid", "up"):
            unknown = [part]
        if unknown:
            raise InvalidRequest("ip_adapter_scale", f"{bundle.name} has no {', '.join(unknown)}")
        _check_layers(part, blocks, bundle)


def _check_layers(part: str, blocks: Any, bundle: Bundle) -> None:
    """Check that a list has one number per layer of a block, or one for all; the middle block has a single layer."""
    if part == "mid":
        values_by_block, layers = {"mid": blocks}, 1
        if isinstance(blocks, dict):
            raise InvalidRequest("ip_adapter_scale", f"mid has no {', '.join(blocks)}: it is a single block")
    else:
        layers = bundle.transformer_per_block[part]
        indices = [layer.name.split(".")[1] for layer in bundle.layers if layer.name.startswith(f"{part}_blocks")]
        attention_blocks = [f"block_{index}" for index in dict.fromkeys(indices)]
        by_block = blocks if isinstance(blocks, dict) else dict.fromkeys(attention_blocks, blocks)
        values_by_block = {f"{part}.{block}": values for block, values in by_block.items() if block in attention_blocks}
    for block, values in values_by_block.items():
        if isinstance(values, list) and len(values) not in (1, layers):
            expected = "one number" if layers == 1 else f"{layers} numbers (one per layer), or one for all"
            raise InvalidRequest("ip_adapter_scale", f"{block} takes {expected}; got {len(values)}")
