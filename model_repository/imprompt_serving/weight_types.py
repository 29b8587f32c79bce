"""Distribute a scale over the cross-attention layers: the weight types of ComfyUI IPAdapter Plus.

Each family defines its style and composition layers. Easings run over the layers in the order down, up, mid.
"""

from __future__ import annotations

from collections.abc import Callable

from imprompt_serving.families import get_family
from imprompt_serving.specs import Bundle

_FLOOR = 0.05
"""Fraction of the scale that an easing leaves for the weakest layer."""
_WEAK = 0.2
"""Fraction of the scale that weak blocks keep."""

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
_ROLES = ("style", "composition", "style and composition")
WEIGHT_TYPES: tuple[str, ...] = (*_EASINGS, *_BLOCKS, *_ROLES)


def layer_weights(bundle: Bundle, weight_type: str) -> list[float]:
    """Return the factor of each cross-attention layer [L] for one of `WEIGHT_TYPES`."""
    names = [layer.name for layer in bundle.layers]
    if weight_type in _EASINGS:
        return [_EASINGS[weight_type](index / len(names)) for index in range(len(names))]
    if weight_type in _BLOCKS:
        return [_BLOCKS[weight_type].get(name.split("_")[0], 1.0) for name in names]
    layers = get_family(bundle.family).layer_roles(bundle.layers)
    selected = frozenset[str]().union(*(layers[role] for role in weight_type.split(" and ")))
    return [float(name in selected) for name in names]
