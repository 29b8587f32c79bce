"""IP-Adapter files: read without running code, told apart by their keys, checked against base and image encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import CLIPVisionModelWithProjection

from imprompt_export.bundle import BundleError, IPAdapterSection
from imprompt_serving.specs import AdapterKind

StateDict = dict[str, dict[str, torch.Tensor]]
_PARTS = ("image_proj", "ip_adapter")


def read(file: Path) -> StateDict:
    """An adapter file as ``{"image_proj": ..., "ip_adapter": ...}`` in float32."""
    if file.suffix == ".safetensors":
        state_dict: StateDict = {part: {} for part in _PARTS}
        with safe_open(file, framework="pt", device="cpu") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                part, _, rest = key.partition(".")
                if part in state_dict:
                    state_dict[part][rest] = tensors.get_tensor(key)
    else:
        try:
            state_dict = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise BundleError(f"{file} is not a file of plain tensors: {error}") from error
    if not isinstance(state_dict, dict) or not all(state_dict.get(part) for part in _PARTS):
        raise BundleError(f"{file} is not an IP-Adapter: it lacks image_proj or ip_adapter weights")
    return {part: {key: value.float() for key, value in state_dict[part].items()} for part in _PARTS}


def kind_of(state_dict: StateDict, weight_name: str) -> AdapterKind:
    """The kind of an adapter, by the keys that diffusers' loader goes by.

    FaceID plus and plus v2 have the same keys; what tells them apart is the file's name.
    """
    keys = state_dict["image_proj"].keys()
    if "proj.weight" in keys:
        return "plain"
    if "proj.3.weight" in keys:
        return "full_face"
    if any(key.startswith("perceiver_resampler.") for key in keys):
        return "faceid_plusv2" if "plusv2" in weight_name.replace("-", "").replace("_", "") else "faceid_plus"
    if "norm.weight" in keys:
        return "faceid"
    if "latents" in keys:
        return "plus"
    raise BundleError(f"{weight_name}: unknown layout of image_proj weights")


def embed_shapes(
    kind: AdapterKind, state_dict: StateDict, encoder: CLIPVisionModelWithProjection | None
) -> dict[str, tuple[int, ...]]:
    """Shape of one picture's input to the projection, by name, as diffusers' pipelines pass it."""
    shapes: dict[str, tuple[int, ...]] = {}
    if kind.startswith("faceid"):
        shapes["image_embeds"] = (1, state_dict["image_proj"]["proj.0.weight"].shape[1])
    if encoder is None:
        return shapes
    config = encoder.config
    hidden = ((config.image_size // config.patch_size) ** 2 + 1, config.hidden_size)
    if kind.startswith("faceid_plus"):
        shapes["clip_embeds"] = hidden
    elif kind != "faceid":
        shapes["image_embeds"] = (config.projection_dim,) if kind == "plain" else hidden
    return shapes


def check_fit(
    section: IPAdapterSection, state_dict: StateDict, unet: Any, encoder: CLIPVisionModelWithProjection | None
) -> None:
    """Refuse an adapter whose layers, cross-attention width or encoder width differ from those of the bundle."""
    name, config = f"ip_adapter {section.name}", unet.config
    weights = [value for key, value in state_dict["ip_adapter"].items() if key.endswith(".to_k_ip.weight")]
    layers = sum(1 for key in unet.attn_processors if key.endswith("attn2.processor"))
    width = weights[0].shape[1] if weights else 0
    if (len(weights), width) != (layers, config.cross_attention_dim):
        raise BundleError(
            f"{name}: {section.weight_name} is made for {len(weights)} attention layers of width {width}, but the base "
            f"has {layers} of width {config.cross_attention_dim}; take the file for this family "
            "(models/ip-adapter*_sd15 for SD1.5, sdxl_models/ip-adapter*_sdxl for SDXL)"
        )
    kind = kind_of(state_dict, section.weight_name)
    if kind == "faceid":
        return
    if encoder is None:
        raise BundleError(f"{name}: a {kind} adapter needs an image encoder; set image_encoder_folder")
    projection = state_dict["image_proj"]
    if kind == "plain":
        wants, has, what = projection["proj.weight"].shape[1], encoder.config.projection_dim, "embeddings"
    else:
        key = {"full_face": "proj.0.weight", "plus": "proj_in.weight"}.get(kind, "perceiver_resampler.proj_in.weight")
        wants, has, what = projection[key].shape[1], encoder.config.hidden_size, "hidden states"
    if wants != has:
        raise BundleError(
            f"{name}: {section.weight_name} wants {what} of width {wants}, but its image encoder gives {has}; "
            "ip-adapter_sdxl goes with the ViT-bigG encoder of sdxl_models/image_encoder, all others (the "
            "*_sdxl_vit-h ones too) with the ViT-H encoder of models/image_encoder"
        )
