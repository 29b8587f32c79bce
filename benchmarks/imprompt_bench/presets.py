"""Architectures to measure with random weights, and the default size, steps and samples for each.

`sd15` and `sdxl` are the public configurations (stable-diffusion-v1-5, stable-diffusion-xl-base-1.0, and ViT-H with
the plain adapter from h94/IP-Adapter). `small` is SD 1.5 at a quarter of the width, and `tiny` is far smaller. Random
weights are enough, because speed does not depend on their values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Config = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """Constructor arguments of each network (diffusers, transformers), and defaults for measurements."""

    family: Literal["sd15", "sdxl"]
    unet: Config
    text: tuple[Config, ...]
    vae: Config
    vision: Config
    motion: bool
    """Whether the bundle has a motion adapter, and thus a second UNet."""
    size: int
    steps: int
    requests: int
    """Samples per measurement."""


def _text(hidden: int, layers: int, heads: int, activation: str) -> Config:
    return {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "projection_dim": hidden,
        "hidden_act": activation,
    }


def _vision(hidden: int, layers: int, heads: int, projection: int, image: int, patch: int) -> Config:
    return {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "projection_dim": projection,
        "image_size": image,
        "patch_size": patch,
        "hidden_act": "gelu",
    }


def _unet(channels: tuple[int, ...], width: int, sample: int, **more: Any) -> Config:
    return {"block_out_channels": channels, "cross_attention_dim": width, "sample_size": sample, **more}


def _vae(channels: tuple[int, ...], sample: int, scaling_factor: float, **more: Any) -> Config:
    return {
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "sample_size": sample,
        "scaling_factor": scaling_factor,
        **more,
    }


_CLIP_L = _text(768, 12, 12, "quick_gelu")
_VIT_H = _vision(1280, 32, 16, 1024, 224, 14)

PRESETS = {
    "tiny": Preset(
        family="sd15",
        unet=_unet((32, 64), 48, 8, layers_per_block=1, norm_num_groups=8, attention_head_dim=4)
        | {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        text=(_text(48, 2, 4, "quick_gelu"),),
        vae=_vae((16, 16, 32, 32), 64, 0.18215, norm_num_groups=8),
        vision=_vision(80, 2, 4, 64, 32, 8),
        motion=True,
        size=64,
        steps=4,
        requests=48,
    ),
    "small": Preset(
        family="sd15",
        unet=_unet((80, 160, 320, 320), 192, 64, layers_per_block=2, norm_num_groups=16, attention_head_dim=4),
        text=(_text(192, 12, 3, "quick_gelu"),),
        vae=_vae((32, 64, 128, 128), 512, 0.18215, layers_per_block=2),
        vision=_vision(320, 32, 4, 256, 224, 14),
        motion=True,
        size=256,
        steps=4,
        requests=16,
    ),
    "sd15": Preset(
        family="sd15",
        unet=_unet((320, 640, 1280, 1280), 768, 64, layers_per_block=2, attention_head_dim=8),
        text=(_CLIP_L,),
        vae=_vae((128, 256, 512, 512), 512, 0.18215, layers_per_block=2),
        vision=_VIT_H,
        motion=False,
        size=512,
        steps=2,
        requests=6,
    ),
    "sdxl": Preset(
        family="sdxl",
        unet=_unet(
            (320, 640, 1280),
            2048,
            128,
            layers_per_block=2,
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        text=(_CLIP_L, _text(1280, 32, 20, "gelu")),
        vae=_vae((128, 256, 512, 512), 1024, 0.13025, layers_per_block=2, force_upcast=True),
        vision=_VIT_H,
        motion=False,
        size=1024,
        steps=2,
        requests=6,
    ),
}
