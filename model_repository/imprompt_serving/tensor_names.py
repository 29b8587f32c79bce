"""Names of tensors that are made of a part and whose it is: what one module writes, another reads by the same function.

Names that are a single word of diffusers (`sample`, `timestep`, `prompt_embeds`) stand where they are used.
"""

from __future__ import annotations

NEGATIVE = "negative_"
"""Prefix of the embeddings of the unconditional branch."""


def request_embeds(adapter: str) -> str:
    """Image embeddings of a request, negative and positive."""
    return f"ip_adapter_image_embeds_{adapter}"


def image_embeds(adapter: str) -> str:
    """Image embeddings of one branch, which the adapter's projection takes; answer to `encode_image`."""
    return f"image_embeds_{adapter}"


def clip_embeds(adapter: str) -> str:
    """Features of the picture beside a face embedding."""
    return f"clip_embeds_{adapter}"


def adapter_masks(adapter: str) -> str:
    """Masks of an adapter's pictures, in pixels."""
    return f"ip_adapter_masks_{adapter}"


def control_image(net: str) -> str:
    """Control images of a ControlNet or T2I-Adapter, in pixels."""
    return f"control_image_{net}"


def ip_tokens(adapter: str) -> str:
    """UNet input: image tokens [rows, groups, tokens, features]."""
    return f"ip_tokens_{adapter}"


def ip_bias(adapter: str) -> str:
    """UNet input: 0, or a large negative number for padding [rows, groups, tokens]."""
    return f"ip_bias_{adapter}"


def ip_scale(adapter: str) -> str:
    """UNet input: the scale of each group and cross-attention layer [rows, groups, layers]."""
    return f"ip_scale_{adapter}"


def ip_mask(adapter: str, level: int) -> str:
    """UNet input: the weight of each query position at one attention resolution [rows, groups, queries]."""
    return f"ip_mask_{adapter}_{level}"


def ip_inputs(adapter: str, levels: tuple[int, ...]) -> list[str]:
    """All UNet inputs of an adapter."""
    return [ip_tokens(adapter), ip_bias(adapter), ip_scale(adapter), *(ip_mask(adapter, level) for level in levels)]
