"""How a scale is spread over the cross-attention layers: the weight types of ComfyUI's IPAdapter plus.

Blocks of style and composition: InstantStyle (https://arxiv.org/abs/2404.02733) for SDXL, and for SD1.5 the layers that
the community settled on (https://github.com/cubiq/ComfyUI_IPAdapter_plus). The easing runs over the layers in the order
down, up, mid.
"""

from __future__ import annotations

from collections.abc import Callable

from imprompt_serving.specs import Bundle

_FLOOR = 0.05
"""Share of the scale that the weakest layer of an easing keeps."""
_WEAK = 0.2

_EASINGS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0,
    "ease in": lambda x: _FLOOR + (1 - _FLOOR) * (1 - x),
    "ease out": lambda x: _FLOOR + (1 - _FLOOR) * x,
    "ease in-out": lambda x: _FLOOR + (1 - _FLOOR) * (1 - abs(2 * x - 1)),
    "reverse in-out": lambda x: _FLOOR + (1 - _FLOOR) * abs(2 * x - 1),
}
_BLOCKS: dict[str, dict[str, float]] = {
    "weak input": {"down": _WEAK},
    "weak middle": {"mid": _WEAK},
    "weak output": {"up": _WEAK},
    "strong middle": {"down": _WEAK, "up": _WEAK},
}
_PARTS = ("style", "composition", "style and composition")
WEIGHT_TYPES: tuple[str, ...] = (*_EASINGS, *_BLOCKS, *_PARTS)


def layer_weights(bundle: Bundle, weight_type: str) -> list[float]:
    """Factor of each cross-attention layer [L], for one of ``WEIGHT_TYPES``."""
    names = [layer.name for layer in bundle.layers]
    if weight_type in _EASINGS:
        return [_EASINGS[weight_type](index / len(names)) for index in range(len(names))]
    if weight_type in _BLOCKS:
        return [_BLOCKS[weight_type].get(name.split("_")[0], 1.0) for name in names]
    wanted = weight_type.split(" and ")
    return [float(any(_belongs(bundle, name, part) for part in wanted)) for name in names]


def _belongs(bundle: Bundle, layer: str, part: str) -> bool:
    """Whether a layer carries ``part``: style or composition."""
    down = [int(cross.name.split(".")[1]) for cross in bundle.layers if cross.name.startswith("down")]
    up = [int(cross.name.split(".")[1]) for cross in bundle.layers if cross.name.startswith("up")]
    composition = layer.startswith(f"down_blocks.{max(down, default=0)}.")
    if bundle.family == "sdxl":
        return (
            composition if part == "composition" else layer.startswith(f"up_blocks.{min(up, default=0)}.attentions.1.")
        )
    return composition if part == "composition" else not composition and f"up_blocks.{min(up, default=0)}." not in layer
