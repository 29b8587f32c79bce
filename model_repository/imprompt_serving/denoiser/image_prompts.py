"""The image prompts of one job as UNet inputs: tokens, padding bias, scales, and masks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales_for_one_adapter
from torch import Tensor

from imprompt_serving import tensor_names
from imprompt_serving.job_request import AdapterOptions
from imprompt_serving.specs import Bundle, level_size
from imprompt_serving.weight_types import layer_weights

PADDING_BIAS = -1e4
"""Attention bias of padding tokens. It makes their softmax weight exactly zero, also in half precision."""


def group_scales(bundle: Bundle, use: AdapterOptions, groups: int) -> Tensor:
    """Return the scale of one adapter for each group of image tokens and each cross-attention layer [G, L].

    diffusers' own function expands scales by block. A list has one number for each group.
    """
    columns = [value if isinstance(value, list) else [value] * groups for value in _layer_scales(bundle, use)]
    return torch.tensor(columns, dtype=torch.float32).T * torch.tensor(layer_weights(bundle, use.weight_type))


def _layer_scales(bundle: Bundle, use: AdapterOptions) -> list[Any]:
    """Return the scale of each layer: a number, or a list with one for each group."""
    if not isinstance(use.scale, dict):
        return [use.scale for _ in bundle.layers]
    names = [layer.name for layer in bundle.layers]
    blocks: dict[str, Any] = {
        part: sorted({int(name.split(".")[1]) for name in names if name.startswith(f"{part}_blocks")})
        for part in ("down", "up")
    }
    model: Any = SimpleNamespace(state_dict=lambda: dict.fromkeys(names))
    expanded = _maybe_expand_lora_scales_for_one_adapter(
        use.scale, blocks, bundle.transformer_per_block, model=model, default_scale=0.0
    )
    return [next((scale for block, scale in expanded.items() if name.startswith(block)), 1.0) for name in names]


def adapter_inputs(
    bundle: Bundle, name: str, branches: list[Tensor], scale: Tensor, size: tuple[int, int], masks: Tensor | None
) -> dict[str, Tensor]:
    """Return the UNet inputs of adapter `name`, with one row for each guidance branch.

    Args:
        branches: image tokens [images, T, D] of each branch. As in diffusers, all images form one group without
            `masks`, and each image forms its own group with masks.
        scale: scale per group and layer [G, L].
        size: height and width of the latents.
        masks: one mask for each image [images, H, W], 0 or 1.
    """
    if masks is None:
        tokens = torch.stack([branch.flatten(0, 1)[None] for branch in branches])
    else:
        tokens = torch.stack(branches)
    rows, groups = tokens.shape[:2]
    inputs = {
        tensor_names.ip_tokens(name): tokens,
        tensor_names.ip_bias(name): torch.zeros(tokens.shape[:3]),
        tensor_names.ip_scale(name): scale.expand(rows, *scale.shape),
    }
    for level in bundle.levels:
        queries = level_size(size[0], level) * level_size(size[1], level)
        mask = torch.ones(groups, queries) if masks is None else _downsample(masks, queries)
        inputs[tensor_names.ip_mask(name, level)] = mask.expand(rows, groups, queries)
    return inputs


def absent_inputs(bundle: Bundle, name: str, branches: int, features: int, size: tuple[int, int]) -> dict[str, Tensor]:
    """Return the UNet inputs of an adapter that a job does not use: one token with scale 0."""
    tokens = [torch.zeros(1, 1, features)] * branches
    return adapter_inputs(bundle, name, tokens, torch.zeros(1, len(bundle.layers)), size, None)


def has_regions(bundle: Bundle, inputs: Mapping[str, Tensor]) -> bool:
    """Return whether an adapter has several groups in these UNet inputs."""
    return any(inputs[tensor_names.ip_tokens(adapter.name)].shape[1] > 1 for adapter in bundle.adapters)


def _downsample(masks: Tensor, queries: int) -> Tensor:
    """Resize masks to the resolution of one attention level [images, q], by diffusers' own function."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the aspect ratio concerns the caller, not the server's log
        return torch.cat([IPAdapterMaskProcessor.downsample(mask[None], 1, queries, 1)[:, :, 0] for mask in masks])


def pad_image_prompt(tensor: Tensor, name: str, groups: int, tokens: int) -> Tensor:
    """Pad the input `name` of an adapter to `groups` and `tokens`, so that rows of several jobs can be stacked.

    Padding tokens get a bias that takes them out of the softmax. Padding groups get scale 0.
    """
    kind = name.split("_")[1]
    more_groups = groups - tensor.shape[1]
    more_tokens = tokens - tensor.shape[2] if kind in ("tokens", "bias") else 0
    if not more_groups and not more_tokens:
        return tensor
    value = PADDING_BIAS if kind == "bias" else 0.0
    # From the last axis to the first, as torch takes them.
    widths = {"tokens": (0, 0, 0, more_tokens, 0, more_groups), "bias": (0, more_tokens, 0, more_groups)}
    return torch.nn.functional.pad(tensor, widths.get(kind, (0, 0, 0, more_groups)), value=value)
