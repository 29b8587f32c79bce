"""Image prompts of one job as the UNet takes them: tokens, padding bias, scales and masks (docs/graphs.md)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales_for_one_adapter
from torch import Tensor

from imprompt_serving.errors import InvalidRequest
from imprompt_serving.job import Scale
from imprompt_serving.specs import Bundle, level_size

PADDING = -1e4
"""Bias of a padding token: its share of the softmax is exactly zero, in half precision too."""


def input_names(adapter: str, levels: tuple[int, ...]) -> list[str]:
    """Names of the UNet inputs that belong to one adapter."""
    return [f"ip_{kind}_{adapter}" for kind in ("tokens", "bias", "scale")] + [f"ip_mask_{adapter}_{i}" for i in levels]


def layer_scales(bundle: Bundle, scale: Scale) -> Tensor:
    """The scale of one adapter for each cross-attention layer [L], by diffusers' own expansion of per-block values."""
    if not isinstance(scale, dict):
        return torch.full((len(bundle.layers),), float(scale))  # type: ignore[arg-type]
    names = [layer.name for layer in bundle.layers]
    blocks: dict[str, Any] = {
        part: sorted({int(name.split(".")[1]) for name in names if name.startswith(f"{part}_blocks")})
        for part in ("down", "up")
    }
    model = SimpleNamespace(state_dict=lambda: dict.fromkeys(names))
    try:
        expanded = _maybe_expand_lora_scales_for_one_adapter(
            scale, blocks, bundle.transformer_per_block, model=model, default_scale=0.0
        )
        values = [next((float(v) for k, v in expanded.items() if name.startswith(k)), 1.0) for name in names]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidRequest("ip_adapter_scale", f"{scale} does not fit the blocks of {bundle.name}: {error}") from error
    return torch.tensor(values)


def adapter_inputs(
    bundle: Bundle, name: str, branches: list[Tensor], scale: Tensor, height: int, width: int
) -> dict[str, Tensor]:
    """UNet inputs of adapter ``name`` with a row for each guidance branch.

    Args:
        branches: image tokens [images, T, D] of each branch; all images form one group, as in diffusers.
        scale: [G, L].
        height, width: of the latents.
    """
    tokens = torch.stack([branch.flatten(0, 1)[None] for branch in branches])
    return _inputs(bundle, name, tokens, torch.zeros(tokens.shape[:3]), scale, height, width)


def absent_inputs(bundle: Bundle, name: str, branches: int, width_: int, height: int, width: int) -> dict[str, Tensor]:
    """UNet inputs of an adapter that a job does not use: one token, scale 0."""
    tokens = torch.zeros(branches, 1, 1, width_)
    scale = torch.zeros(1, len(bundle.layers))
    return _inputs(bundle, name, tokens, torch.zeros(branches, 1, 1), scale, height, width)


def _inputs(
    bundle: Bundle, name: str, tokens: Tensor, bias: Tensor, scale: Tensor, height: int, width: int
) -> dict[str, Tensor]:
    rows, groups = tokens.shape[:2]
    masks = {
        f"ip_mask_{name}_{i}": torch.ones(rows, groups, level_size(height, i) * level_size(width, i))
        for i in bundle.levels
    }
    return {
        f"ip_tokens_{name}": tokens,
        f"ip_bias_{name}": bias,
        f"ip_scale_{name}": scale.expand(rows, *scale.shape),
        **masks,
    }


def pad(tensor: Tensor, name: str, groups: int, tokens: int) -> Tensor:
    """Widen one of the inputs above to ``groups`` and ``tokens``, so that rows of several jobs can be stacked.

    Padding tokens get a bias that takes them out of the softmax; padding groups get scale 0.
    """
    kind = name.split("_")[1]
    missing = groups - tensor.shape[1]
    short = tokens - tensor.shape[2] if kind in ("tokens", "bias") else 0
    if not missing and not short:
        return tensor
    value = PADDING if kind == "bias" else 0.0
    widths = {"tokens": (0, 0, 0, short, 0, missing), "bias": (0, short, 0, missing)}.get(kind, (0, 0, 0, missing))
    return torch.nn.functional.pad(tensor, widths, value=value)
