"""The image prompts of one job as UNet inputs: tokens, padding bias, scales, and masks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales_for_one_adapter
from torch import Tensor

from imprompt_serving import tensor_names
from imprompt_serving.denoiser.windows import Window, select_frames
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


@dataclass(frozen=True, kw_only=True, slots=True)
class RowLayout:
    """The rows of a job: in each guidance branch, the results of the first prompt, then those of the next.

    `frames` are those of each clip (None for pictures), and `size` is the height and width of the latents.
    """

    branches: int
    prompts: int
    results: int
    frames: int | None
    size: tuple[int, int]

    def rows(self, branches: Sequence[Tensor]) -> Tensor:
        """Return all rows of a tensor that has [prompts or 1, ...] in each branch."""
        by_prompt = [branch.expand(self.prompts, *branch.shape[1:]) for branch in branches]
        return torch.cat(by_prompt).repeat_interleave(self.results, dim=0)


def adapter_inputs(
    bundle: Bundle, use: AdapterOptions, branches: list[Tensor], layout: RowLayout, masks: Tensor | None
) -> dict[str, Tensor]:
    """Return the UNet inputs of an adapter. For clips, tokens and masks have an axis of frames after that of rows.

    That axis has a size of 1 if all frames have the same tokens or masks.

    Args:
        branches: tokens of all images [images, T, D] in each branch. As in diffusers, the images of a row form one
            group without `masks`, and each image forms its own group with masks.
        masks: one mask for each image of a row, or as many for each prompt (clips: for each frame) [masks, H, W].
    """
    tokens = layout.rows([_grouped(branch, use, layout, masked=masks is not None) for branch in branches])
    groups = tokens.shape[-3]
    scale = group_scales(bundle, use, groups)
    inputs = {
        tensor_names.ip_tokens(use.name): tokens,
        tensor_names.ip_bias(use.name): torch.zeros(len(tokens), *tokens.shape[-3:-1]),
        tensor_names.ip_scale(use.name): scale.expand(len(tokens), *scale.shape),
    }
    for level in bundle.levels:
        queries = level_size(layout.size[0], level) * level_size(layout.size[1], level)
        mask = torch.ones(groups, queries) if masks is None else _downsample(masks, queries)
        mask = mask.unflatten(0, (-1, groups))
        inputs[tensor_names.ip_mask(use.name, level)] = layout.rows(
            [mask if layout.frames is None else mask[None]] * layout.branches
        )
    return inputs


def _grouped(tokens: Tensor, use: AdapterOptions, layout: RowLayout, *, masked: bool) -> Tensor:
    """Group the image tokens [images, T, D] of one branch: [prompts or 1, G, T, D], with frames as in the inputs."""
    shares = tokens.unflatten(0, (use.shares(layout.prompts), -1))
    grouped = shares if masked else shares.flatten(1, 2)[:, None]
    if layout.frames is None:
        return grouped
    return interpolate(grouped, use.keyframes, layout.frames)[None] if use.keyframes else grouped[:, None]


def interpolate(tokens: Tensor, keyframes: Sequence[int], frames: int) -> Tensor:
    """Interpolate the tokens of keyframes [K, ...] linearly to all frames [frames, ...].

    Frames after the last keyframe have its tokens. diffusers' FreeNoise does the same with prompts.
    """
    ends, positions = torch.tensor(keyframes), torch.arange(frames)
    before = torch.searchsorted(ends, positions, right=True) - 1
    after = (before + 1).clamp(max=len(keyframes) - 1)
    weight = (positions - ends[before]) / (ends[after] - ends[before]).clamp(min=1)
    return torch.lerp(tokens[before], tokens[after], weight.view(-1, *[1] * (tokens.ndim - 1)))


def absent_inputs(bundle: Bundle, name: str, features: int, layout: RowLayout) -> dict[str, Tensor]:
    """Return the UNet inputs of an adapter that a job does not use: one token with scale 0."""
    tokens = [torch.zeros(1, 1, features)] * layout.branches
    return adapter_inputs(bundle, AdapterOptions(name=name, scale=0.0), tokens, layout, None)


def has_regions(bundle: Bundle, inputs: Mapping[str, Tensor]) -> bool:
    """Return whether an adapter has several groups in these UNet inputs."""
    return any(inputs[tensor_names.ip_tokens(adapter.name)].shape[-3] > 1 for adapter in bundle.adapters)


def _downsample(masks: Tensor, queries: int) -> Tensor:
    """Resize masks to the resolution of one attention level [images, q], by diffusers' own function."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the aspect ratio concerns the caller, not the server's log
        return torch.cat(
            [IPAdapterMaskProcessor.downsample(mask[None].float(), 1, queries, 1)[:, :, 0] for mask in masks]
        )


def differs_by_frame(tensor: Tensor, name: str) -> bool:
    """Return whether the input `name` of an adapter differs between the frames of a clip."""
    return _has_frames(tensor, name) and tensor.shape[1] > 1


def in_window(tensor: Tensor, name: str, window: Window) -> Tensor:
    """Return the frames of `window` of the input `name` of an adapter; inputs without an axis of frames do not change.

    If all frames have the same tokens or masks, they are repeated, without a copy.
    """
    if not _has_frames(tensor, name):
        return tensor
    if tensor.shape[1] > 1:
        return select_frames(tensor, window, axis=1)
    return tensor.expand(-1, len(window), *tensor.shape[2:])


def _has_frames(tensor: Tensor, name: str) -> bool:
    return tensor.ndim > {"tokens": 4}.get(_kind(name), 3)


def _kind(name: str) -> str:
    """Return which input of an adapter `name` is: `tokens`, `bias`, `scale`, or `mask`."""
    return name.split("_")[1]


def pad_image_prompt(tensor: Tensor, name: str, groups: int, tokens: int) -> Tensor:
    """Pad the input `name` of an adapter to `groups` and `tokens`, so that rows of several jobs can be stacked.

    Padding tokens get a bias that takes them out of the softmax. Padding groups get scale 0.
    """
    kind = _kind(name)
    more_groups = groups - tensor.shape[-3 if kind == "tokens" else -2]
    more_tokens = tokens - tensor.shape[{"tokens": -2, "bias": -1}[kind]] if kind in ("tokens", "bias") else 0
    if not more_groups and not more_tokens:
        return tensor
    value = PADDING_BIAS if kind == "bias" else 0.0
    # From the last axis to the first, as torch takes them.
    widths = {"tokens": (0, 0, 0, more_tokens, 0, more_groups), "bias": (0, more_tokens, 0, more_groups)}
    return torch.nn.functional.pad(tensor, widths.get(kind, (0, 0, 0, more_groups)), value=value)
