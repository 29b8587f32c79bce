"""Names of tensors that belong to an adapter or a ControlNet, so that every module builds them the same way.

Fixed names from diffusers (`sample`, `timestep`, `prompt_embeds`) are written out where they are used.
"""

from __future__ import annotations

NEGATIVE = "negative_"
"""Prefix of embeddings for the unconditional branch."""


def request_embeds(adapter: str) -> str:
    """Name the image embeddings of a request: [2 (negative, positive) or 1 (positive), pictures, ...]."""
    return f"ip_adapter_image_embeds_{adapter}"


def image_embeds(adapter: str) -> str:
    """Name the image embeddings of one branch: input of the adapter's projection, and output of `encode_image`."""
    return f"image_embeds_{adapter}"


def clip_embeds(adapter: str) -> str:
    """Name the CLIP features of the picture that goes with a face embedding."""
    return f"clip_embeds_{adapter}"


def adapter_masks(adapter: str) -> str:
    """Name the masks of an adapter's pictures, in pixels."""
    return f"ip_adapter_masks_{adapter}"


def control_image(net: str) -> str:
    """Name the control images of a ControlNet or T2I-Adapter, in pixels."""
    return f"control_image_{net}"


def ip_tokens(adapter: str) -> str:
    """Name a UNet input: image tokens [rows, groups, tokens, features]; for clips [rows, frames, groups, ...]."""
    return f"ip_tokens_{adapter}"


def ip_bias(adapter: str) -> str:
    """Name a UNet input: 0, or a large negative number for padding [rows, groups, tokens]."""
    return f"ip_bias_{adapter}"


def ip_scale(adapter: str) -> str:
    """Name a UNet input: the scale of each group and cross-attention layer [rows, groups, layers]."""
    return f"ip_scale_{adapter}"


def ip_mask(adapter: str, level: int) -> str:
    """Name a UNet input: the weight of each query position at one attention resolution [rows, groups, queries].

    For clips [rows, frames, groups, queries].
    """
    return f"ip_mask_{adapter}_{level}"


def ip_inputs(adapter: str, levels: tuple[int, ...]) -> list[str]:
    """List all UNet inputs of an adapter."""
    return [ip_tokens(adapter), ip_bias(adapter), ip_scale(adapter), *(ip_mask(adapter, level) for level in levels)]
