"""IP-Adapter cross-attention with everything that a request can vary as a tensor: tokens, padding, scales, masks.

The paper is https://arxiv.org/abs/2308.06721; results equal those of diffusers' `IPAdapterAttnProcessor2_0`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from imprompt_serving.specs import CrossAttention


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterPrompts:
    """The image prompts of one adapter in one UNet call: B rows with G groups of T tokens each.

    Shapes: `tokens` [B * G, T, D], `bias` [B * G, 1, 1, T] (0, or large and negative for padding), `scale` [B, G, L]
    (one value per layer), `masks` [B, G, q] by level.
    """

    tokens: Tensor
    bias: Tensor
    scale: Tensor
    masks: dict[int, Tensor]

    @classmethod
    def of(cls, *, tokens: Tensor, bias: Tensor, scale: Tensor, masks: dict[int, Tensor]) -> AdapterPrompts:
        """Reshape the inputs of the graph: `tokens` [B, G, T, D] and `bias` [B, G, T]."""
        return cls(tokens=tokens.flatten(0, 1), bias=bias.flatten(0, 1)[:, None, None], scale=scale, masks=masks)


@dataclass(kw_only=True, slots=True)
class ImagePrompts:
    """The image prompts of all adapters: set by the graph before each UNet call, read by all cross-attention layers."""

    adapters: list[AdapterPrompts] = field(default_factory=list)


class ImagePromptProcessor(nn.Module):
    """Attention processor of one cross-attention layer: text attention plus the image attention of every adapter."""

    def __init__(
        self, prompts: ImagePrompts, layer: int, level: int, to_k_ip: nn.ModuleList, to_v_ip: nn.ModuleList
    ) -> None:
        super().__init__()
        self.prompts, self.layer, self.level = prompts, layer, level
        self.to_k_ip, self.to_v_ip = to_k_ip, to_v_ip

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None) -> Tensor:  # type: ignore[no-untyped-def]
        def heads(states: Tensor) -> Tensor:
            return states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
            """Attend over rows [B, S, heads * d]; compilers fuse this with the transposes around it."""
            attended = F.scaled_dot_product_attention(heads(query), heads(key), heads(value), attn_mask=bias)
            return attended.transpose(1, 2).flatten(2)

        query = attn.to_q(hidden_states)
        attended = attend(query, attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        for prompts, to_k, to_v in zip(self.prompts.adapters, self.to_k_ip, self.to_v_ip, strict=True):
            # Each group of tokens is a row of ordinary attention. The weight of a group is the same for all of its
            # tokens, so it can be applied to the output. Between softmax and product it would prevent fusion.
            groups = prompts.scale.shape[:2]
            queries = query[:, None].expand(-1, groups[1], -1, -1).flatten(0, 1)
            drawn = attend(queries, to_k(prompts.tokens), to_v(prompts.tokens), prompts.bias)
            weight = prompts.scale[:, :, self.layer, None] * prompts.masks[self.level]
            attended = attended + (drawn.unflatten(0, groups) * weight[..., None]).sum(1)
        return attn.to_out[0](attended)


def cross_attention_layers(unet: Any) -> list[CrossAttention]:
    """List the layers that attend to the prompts, in the order of `attn_processors`: down, up, mid."""
    last = len(unet.config.block_out_channels) - 1
    layers = []
    for name in unet.attn_processors:
        if not name.endswith("attn2.processor") or "motion_modules" in name:
            continue
        kind, index = name.split(".")[:2]
        level = {"down_blocks": lambda i: int(i), "up_blocks": lambda i: last - int(i), "mid_block": lambda _: last}
        layers.append(CrossAttention(name=name.removesuffix(".processor"), level=level[kind](index)))
    return layers


def install(unet: Any) -> ImagePrompts:
    """Replace the cross-attention processors of `unet` by this module's; diffusers may have loaded adapters into it.

    Also removes the image projections, which run once per request and not at each step; take them out before.
    """
    prompts = ImagePrompts()
    processors = dict(unet.attn_processors)
    for index, layer in enumerate(cross_attention_layers(unet)):
        key = f"{layer.name}.processor"
        loaded = processors[key]
        to_k, to_v = getattr(loaded, "to_k_ip", nn.ModuleList()), getattr(loaded, "to_v_ip", nn.ModuleList())
        processors[key] = ImagePromptProcessor(prompts, index, layer.level, to_k, to_v)
    unet.set_attn_processor(processors)
    unet.encoder_hid_proj = None
    unet.register_to_config(encoder_hid_dim_type=None)
    return prompts
