"""IP-Adapter files: read without running code, told apart by their keys, checked against base and image encoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imprompt_export import kinds
from imprompt_export.errors import BundleError
from imprompt_export.families import all_families
from imprompt_export.sources import flat
from imprompt_serving.specs import AdapterKind

StateDict = Mapping[str, Mapping[str, Any]]
"""Tensors, or whatever else has a shape, as `{"image_proj": ..., "ip_adapter": ...}`."""
_PARTS = ("image_proj", "ip_adapter")
_ENTRANCES = {"plain": "proj.weight", "full_face": "proj.0.weight", "plus": "proj_in.weight"}
"""The first weights of a projection: those that take what the image encoder gives."""


def read(file: Path) -> StateDict:
    """An adapter file in float32."""
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        content: Mapping[str, Any] = load_file(file)
    else:
        import torch

        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise BundleError(f"{file} is not a file of plain tensors: {error}") from error
    state_dict = in_parts(str(file), content)
    return {part: {key: value.float() for key, value in state_dict[part].items()} for part in _PARTS}


def in_parts(what: str, content: Mapping[str, Any]) -> StateDict:
    """The two parts of an adapter file, whether its tensors are nested (`.bin`) or not (`.safetensors`).

    Raises:
        BundleError: it is something else.
    """
    tensors = flat(content)
    state_dict: dict[str, dict[str, Any]] = {part: {} for part in _PARTS}
    for name, value in tensors.items():
        part, _, key = name.partition(".")
        if part in state_dict:
            state_dict[part][key] = value
    missing = [part for part in _PARTS if not state_dict[part]]
    if len(missing) == 2:
        raise BundleError(f"{what} is not an IP-Adapter: it is {kinds.of_names(tensors)}")
    if missing:
        raise BundleError(f"{what} is not an IP-Adapter: it lacks {missing[0]} weights")
    return state_dict


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


def embed_shapes(kind: AdapterKind, state_dict: StateDict, encoder: Any | None) -> dict[str, tuple[int, ...]]:
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
    name: str, file: str, state_dict: StateDict, layers: int, width: int, encoder: Mapping[str, Any] | None
) -> None:
    """Refuse an adapter that is not made for `layers` of cross-attention of `width`, or for its `encoder`.

    Args:
        encoder: configuration of its image encoder; None if it has none.

    Raises:
        BundleError: it does not fit; the message has both numbers.
    """
    weights = [value for key, value in state_dict["ip_adapter"].items() if key.endswith(".to_k_ip.weight")]
    found = weights[0].shape[1] if weights else 0
    if (len(weights), found) != (layers, width):
        files = ", ".join(f"{family.adapter_files} for {family.title}" for family in all_families())
        raise BundleError(
            f"ip_adapter {name}: {file} is made for {len(weights)} attention layers of width {found}, but the base "
            f"has {layers} of width {width}; take the file for this family ({files})"
        )
    kind = kind_of(state_dict, file)
    if kind == "faceid":
        return
    if encoder is None:
        raise BundleError(f"ip_adapter {name}: a {kind} adapter needs an image encoder; set image_encoder_folder")
    projection = state_dict["image_proj"]
    key = _ENTRANCES.get(kind, "perceiver_resampler.proj_in.weight")
    if key not in projection:
        raise BundleError(f"ip_adapter {name}: {file} is incomplete: it has no image_proj.{key}")
    size, what = ("projection_dim", "embeddings") if kind == "plain" else ("hidden_size", "hidden states")
    wants, has = projection[key].shape[1], encoder[size]
    if wants != has:
        raise BundleError(
            f"ip_adapter {name}: {file} wants {what} of width {wants}, but its image encoder gives {has}; "
            "ip-adapter_sdxl goes with the ViT-bigG encoder of sdxl_models/image_encoder, all others (the "
            "*_sdxl_vit-h ones too) with the ViT-H encoder of models/image_encoder"
        )
