"""Image encoders and IP-Adapter files of every kind, with the key layouts of h94/IP-Adapter and IP-Adapter-FaceID.

diffusers reads these layouts in `UNet2DConditionLoadersMixin._convert_ip_adapter_image_proj_to_diffusers` and
`_load_ip_adapter_loras`. They originate from `ip_adapter/resampler.py` and `ip_adapter/ip_adapter_faceid.py` in
tencent-ailab/IP-Adapter.
"""

from pathlib import Path
from typing import Literal, get_args

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from .base import CROSS_ATTENTION_DIM, VISION, Encoder, Family, unet_config, vision_config
from .weights import generator, linear, normal, private_rng, randomize

Kind = Literal[
    "plain", "light", "plus", "plus_face", "full_face", "faceid", "faceid_portrait", "faceid_plus", "faceid_plusv2"
]
Weights = dict[str, Tensor]

DIM_HEAD = 64  # hard-coded in diffusers' resampler, like its four layers
FACE_DIM = 512  # size of insightface's embeddings
LORA_RANK = 4  # 128 in the real files
LORA_KINDS = ("faceid", "faceid_plus", "faceid_plusv2")

# File names in the public repositories. FaceID files are in the root of theirs, and only as .bin.
WEIGHT_NAMES: dict[tuple[str, str, str], str] = {
    ("sd15", "plain", "vit_h"): "ip-adapter_sd15.safetensors",
    ("sd15", "light", "vit_h"): "ip-adapter_sd15_light.safetensors",
    ("sd15", "plus", "vit_h"): "ip-adapter-plus_sd15.safetensors",
    ("sd15", "plus_face", "vit_h"): "ip-adapter-plus-face_sd15.safetensors",
    ("sd15", "full_face", "vit_h"): "ip-adapter-full-face_sd15.safetensors",
    ("sd15", "faceid", "vit_h"): "ip-adapter-faceid_sd15.bin",
    ("sd15", "faceid_portrait", "vit_h"): "ip-adapter-faceid-portrait_sd15.bin",
    ("sd15", "faceid_plus", "vit_h"): "ip-adapter-faceid-plus_sd15.bin",
    ("sd15", "faceid_plusv2", "vit_h"): "ip-adapter-faceid-plusv2_sd15.bin",
    ("sdxl", "plain", "big_g"): "ip-adapter_sdxl.safetensors",
    ("sdxl", "plain", "vit_h"): "ip-adapter_sdxl_vit-h.safetensors",
    ("sdxl", "plus", "vit_h"): "ip-adapter-plus_sdxl_vit-h.safetensors",
    ("sdxl", "plus_face", "vit_h"): "ip-adapter-plus-face_sdxl_vit-h.safetensors",
    ("sdxl", "faceid", "vit_h"): "ip-adapter-faceid_sdxl.bin",
    ("sdxl", "faceid_portrait", "vit_h"): "ip-adapter-faceid-portrait_sdxl.bin",
    ("sdxl", "faceid_plusv2", "vit_h"): "ip-adapter-faceid-plusv2_sdxl.bin",
}


def make_image_encoder(folder: str | Path, *, kind: Encoder = "vit_h", seed: int = 0) -> Path:
    """Write a CLIPVisionModelWithProjection to `folder`; in the public repositories it is `models/image_encoder`.

    A 32 x 32 picture in patches of 8 becomes 17 tokens. ViT-H: hidden size 80, projected 64; bigG: 104 and 80. As with
    the real ones, bigG projects to the hidden size of ViT-H, so a wrong pairing may fit by accident.
    """
    with private_rng():
        encoder = CLIPVisionModelWithProjection(vision_config(kind))
        randomize(encoder, seed)
        encoder.save_pretrained(folder)
    return Path(folder)


def make_adapter(
    folder: str | Path,
    kind: Kind = "plain",
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    family: Family = "sd15",
    encoder: Encoder | None = None,
    layers_per_block: int | None = None,
    levels: int = 4,
    seed: int = 0,
) -> Path:
    """Write one adapter file to a repository folder and return its path.

    File name and subfolder default to the public ones (`models`, `sdxl_models`, or the root for FaceID). The extension
    decides the format: `.bin` is a nested dict, `.safetensors` is flat. `encoder` is the matching image encoder: bigG
    for plain SDXL, otherwise ViT-H. `layers_per_block` and `levels` must match the base if it is not the default one.
    """
    encoder = encoder or ("big_g" if (family, kind) == ("sdxl", "plain") else "vit_h")
    weight_name = weight_name or WEIGHT_NAMES[family, kind, encoder]
    if subfolder is None:
        subfolder = "" if kind.startswith("faceid") else "sdxl_models" if family == "sdxl" else "models"
    path = Path(folder) / subfolder / weight_name
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = generator(10 + get_args(Kind).index(kind) + 100 * seed)  # light differs from plain, and plus-face from plus
    state = {
        "image_proj": _image_projection(rng, kind, family, encoder),
        "ip_adapter": _attention_layers(rng, family, layers_per_block, levels, lora=kind in LORA_KINDS),
    }
    if path.suffix == ".bin":
        torch.save(state, path)
    else:
        save_file({f"{part}.{key}": value for part, tensors in state.items() for key, value in tensors.items()}, path)
    return path


def _image_projection(rng: torch.Generator, kind: Kind, family: Family, encoder: Encoder) -> Weights:
    hidden_size, projection_dim = VISION[encoder]
    dim = CROSS_ATTENTION_DIM[family]
    if kind in ("plain", "light"):
        return _linear(rng, "proj", 4 * dim, projection_dim) | _norm(rng, "norm", dim)
    if kind in ("plus", "plus_face"):
        inner = {"sd15": 48, "sd2": 48, "sdxl": 80}[family]  # 768 and 1280 in the real ones
        return {"latents": normal(rng, 1, 16, inner)} | _resampler(rng, inner, hidden_size, dim)
    if kind == "full_face":  # Linear, GELU, Linear, LayerNorm on every token of the image encoder
        first, second = _linear(rng, "proj.0", hidden_size, hidden_size), _linear(rng, "proj.2", dim, hidden_size, 2.0)
        return first | second | _norm(rng, "proj.3", dim)
    tokens = 16 if kind == "faceid_portrait" else 4
    # The embedding has unit length, so its elements are small and the weights have to be larger.
    face = _linear(rng, "proj.0", 2 * FACE_DIM, FACE_DIM, gain=FACE_DIM**0.5)
    face |= _linear(rng, "proj.2", tokens * dim, 2 * FACE_DIM, gain=2.0) | _norm(rng, "norm", dim)
    if kind in ("faceid", "faceid_portrait"):
        return face
    resampler = _resampler(rng, dim, hidden_size, dim)
    return face | {f"perceiver_resampler.{key}": value for key, value in resampler.items()}


def _resampler(rng: torch.Generator, dim: int, embedding_dim: int, output_dim: int) -> Weights:
    """Draw the weights of `Resampler` without its latents, which also fit `FacePerceiverResampler`."""
    width = DIM_HEAD * max(1, dim // DIM_HEAD)
    weights = _linear(rng, "proj_in", dim, embedding_dim) | _linear(rng, "proj_out", output_dim, dim)
    weights |= _norm(rng, "norm_out", output_dim)
    for layer in range(4):
        attention, feed_forward = f"layers.{layer}.0", f"layers.{layer}.1"
        weights |= _norm(rng, f"{attention}.norm1", dim) | _norm(rng, f"{attention}.norm2", dim)
        weights[f"{attention}.to_q.weight"] = linear(rng, width, dim, 1.4)
        weights[f"{attention}.to_kv.weight"] = linear(rng, 2 * width, dim, 1.4)
        weights[f"{attention}.to_out.weight"] = linear(rng, dim, width, 1.4)
        weights |= _norm(rng, f"{feed_forward}.0", dim)
        weights[f"{feed_forward}.1.weight"] = linear(rng, 4 * dim, dim)
        weights[f"{feed_forward}.3.weight"] = linear(rng, dim, 4 * dim)
    return weights


def _attention_layers(
    rng: torch.Generator, family: Family, layers_per_block: int | None, levels: int, *, lora: bool
) -> Weights:
    """Draw `<N>.to_k_ip` and `<N>.to_v_ip` for odd N (cross-attention), and `<N>.to_*_lora` for every N."""
    with private_rng(), torch.device("meta"):
        unet = UNet2DConditionModel(**unet_config(family, layers_per_block, levels))
    modules = dict(unet.named_modules())
    weights: Weights = {}
    for index, name in enumerate(unet.attn_processors):
        attention: Attention = modules[name.removesuffix(".processor")]
        inner, context = attention.to_k.weight.shape
        if lora:
            for part, in_features in (("q", inner), ("k", context), ("v", context), ("out", inner)):
                weights[f"{index}.to_{part}_lora.down.weight"] = linear(rng, LORA_RANK, in_features)
                weights[f"{index}.to_{part}_lora.up.weight"] = linear(rng, inner, LORA_RANK, 0.3)
        if index % 2:
            weights[f"{index}.to_k_ip.weight"] = linear(rng, inner, context, 1.4)
            weights[f"{index}.to_v_ip.weight"] = linear(rng, inner, context, 2.0)
    return weights


def _linear(rng: torch.Generator, name: str, out_features: int, in_features: int, gain: float = 1.0) -> Weights:
    bias = normal(rng, out_features, std=0.1)
    return {f"{name}.weight": linear(rng, out_features, in_features, gain), f"{name}.bias": bias}


def _norm(rng: torch.Generator, name: str, dim: int) -> Weights:
    return {f"{name}.weight": 1 + normal(rng, dim, std=0.1), f"{name}.bias": normal(rng, dim, std=0.1)}
