"""Read IP-Adapter files without running code in them, recognize their kind, and check that they fit the base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imprompt_export import checkpoint_kinds
from imprompt_export.errors import BundleError
from imprompt_export.families import all_families
from imprompt_export.sources import flat
from imprompt_serving.specs import AdapterKind

StateDict = Mapping[str, Mapping[str, Any]]
"""`{"image_proj": ..., "ip_adapter": ...}`, each a dict of tensors or of anything else with a `shape`."""
_PARTS = ("image_proj", "ip_adapter")
_INPUT_WEIGHTS = {"plain": "proj.weight", "full_face": "proj.0.weight", "plus": "proj_in.weight"}
"""The first weight of each kind of projection, which multiplies the output of the image encoder."""
_VIT_H_TOKENS = 257
"""Hidden states of one picture that the encoders of all public adapters produce: 16 x 16 patches and the class."""


def read(file: Path) -> StateDict:
    """Read an adapter file as float32 tensors.

    Raises:
        BundleError: the file holds anything but the tensors of an IP-Adapter.
    """
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        content: Mapping[str, Any] = load_file(file)
    else:
        import torch

        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise BundleError(f"{file} is not a file of plain tensors: {error}") from error
    state_dict = split_parts(str(file), content)
    return {part: {key: value.float() for key, value in state_dict[part].items()} for part in _PARTS}


def split_parts(what: str, content: Mapping[str, Any]) -> StateDict:
    """Split the content of an adapter file into its two parts; tensors may be nested (`.bin`) or flat (`.safetensors`).

    Args:
        what: the name of the file in messages.
        content: its tensors, or anything else with a `shape`.

    Raises:
        BundleError: the file is not an IP-Adapter.
    """
    tensors = flat(content)
    state_dict: dict[str, dict[str, Any]] = {part: {} for part in _PARTS}
    for name, value in tensors.items():
        part, _, key = name.partition(".")
        if part in state_dict:
            state_dict[part][key] = value
    missing = [part for part in _PARTS if not state_dict[part]]
    if len(missing) == 2:
        raise BundleError(f"{what} is not an IP-Adapter: it is {checkpoint_kinds.kind_of_tensors(tensors)}")
    if missing:
        raise BundleError(f"{what} is not an IP-Adapter: it has no {missing[0]} weights")
    return state_dict


def kind_of(state_dict: StateDict, weight_name: str) -> AdapterKind:
    """Return the kind of an adapter, from the same keys that diffusers' loader looks at.

    FaceID plus and plus v2 have the same keys and differ only in the file name.

    Raises:
        BundleError: no known kind has these keys.
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
    """Return the shape of each projection input for one picture, by name, as diffusers' pipelines pass it.

    Without an `encoder`, requests bring embeddings, which have the size that the public encoders produce.
    """
    projection, tokens = state_dict["image_proj"], _VIT_H_TOKENS
    if encoder is not None:
        tokens = (encoder.config.image_size // encoder.config.patch_size) ** 2 + 1
    if kind.startswith("faceid"):
        face: dict[str, tuple[int, ...]] = {"image_embeds": (1, projection["proj.0.weight"].shape[1])}
        return face if encoder is None else face | {"clip_embeds": (tokens, encoder.config.hidden_size)}
    width = projection[_INPUT_WEIGHTS[kind]].shape[1]
    return {"image_embeds": (width,) if kind == "plain" else (tokens, width)}


def check_fit(
    name: str, file: str, state_dict: StateDict, layers: int, width: int, encoder: Mapping[str, Any] | None
) -> None:
    """Check that an adapter fits the base and its image encoder.

    Args:
        name: the name of the adapter in the bundle.
        file: the name of its weight file.
        state_dict: its weights.
        layers: number of cross-attention layers in the base's UNet.
        width: width of their keys and values.
        encoder: configuration of the image encoder; None if the adapter has none.

    Raises:
        BundleError: it does not fit; the message gives both numbers.
    """
    weights = [value for key, value in state_dict["ip_adapter"].items() if key.endswith(".to_k_ip.weight")]
    found = weights[0].shape[1] if weights else 0
    if (len(weights), found) != (layers, width):
        files = ", ".join(
            f"{family.adapter_files} for {family.title}" for family in all_families() if family.adapter_files
        )
        raise BundleError(
            f"ip_adapter {name}: {file} is made for {len(weights)} attention layers of width {found}, but the base "
            f"has {layers} of width {width}; use the file for this family ({files})"
        )
    kind = kind_of(state_dict, file)
    if kind == "faceid":
        return
    if encoder is None and kind.startswith("faceid"):
        raise BundleError(
            f"ip_adapter {name}: a {kind} adapter needs an image encoder besides the face embedding; set "
            "image_encoder_folder"
        )
    projection = state_dict["image_proj"]
    key = _INPUT_WEIGHTS.get(kind, "perceiver_resampler.proj_in.weight")
    if key not in projection:
        raise BundleError(f"ip_adapter {name}: {file} is incomplete: it has no image_proj.{key}")
    if encoder is None:
        return
    size, what = ("projection_dim", "embeddings") if kind == "plain" else ("hidden_size", "hidden states")
    expected, actual = projection[key].shape[1], encoder[size]
    if expected != actual:
        raise BundleError(
            f"ip_adapter {name}: {file} needs {what} of width {expected}, but its image encoder produces {actual}; "
            "ip-adapter_sdxl needs the ViT-bigG encoder in sdxl_models/image_encoder, all others (including "
            "*_sdxl_vit-h) need the ViT-H encoder in models/image_encoder"
        )
