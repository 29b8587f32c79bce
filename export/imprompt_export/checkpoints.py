"""Load a checkpoint set with diffusers' own loaders, and refuse what does not fit together before anything is exported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from imprompt_export.bundle import BundleError, BundleFile, IPAdapterSection
from imprompt_serving.specs import AdapterKind

StateDict = dict[str, dict[str, torch.Tensor]]
FAMILIES = {
    "StableDiffusionPipeline": "sd15",
    "StableDiffusionXLPipeline": "sdxl",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedAdapter:
    """An adapter whose weights sit in the UNet: its projection, and where its features come from."""

    name: str
    kind: AdapterKind
    projection: torch.nn.Module
    image_encoder: str | None
    embed_shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoints:
    """A diffusers pipeline with its adapters loaded, and the image encoders by name."""

    family: str
    pipeline: Any
    adapters: tuple[LoadedAdapter, ...]
    image_encoders: dict[str, CLIPVisionModelWithProjection]
    feature_extractors: dict[str, Any]


def load(bundle: BundleFile) -> Checkpoints:
    """Load everything that ``bundle`` names, in float32 on the CPU.

    Raises:
        BundleError: a checkpoint is missing, of another family, or does not fit the UNet or its image encoder.
    """
    base = bundle.locate(bundle.base)
    try:
        pipeline = DiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise BundleError(f"base: {bundle.base} cannot be loaded as a diffusers pipeline: {error}") from error
    class_name = type(pipeline).__name__
    if class_name not in FAMILIES:
        raise BundleError(f"base: {class_name} is not served; pipelines of {', '.join(sorted(FAMILIES))} are")
    base_processor = getattr(pipeline, "feature_extractor", None)
    state_dicts = [read_adapter(bundle.adapter_file(section)) for section in bundle.ip_adapter]
    encoders, names = _load_encoders(bundle)
    adapters = []
    for section, state_dict in zip(bundle.ip_adapter, state_dicts, strict=True):
        encoder = names[section.name]
        check_fit(section, state_dict, pipeline.unet, encoders.get(encoder or ""))
    if state_dicts:
        pipeline.load_ip_adapter(
            list(state_dicts),
            subfolder="",
            weight_name=[section.weight_name for section in bundle.ip_adapter],
            image_encoder_folder=None,
        )
        projections = pipeline.unet.encoder_hid_proj.image_projection_layers
        for section, state_dict, projection in zip(bundle.ip_adapter, state_dicts, projections, strict=True):
            encoder = names[section.name]
            kind = adapter_kind(state_dict)
            shape = embed_shape(kind, encoders.get(encoder or ""))
            adapters.append(
                LoadedAdapter(
                    name=section.name, kind=kind, projection=projection, image_encoder=encoder, embed_shape=shape
                )
            )
    return Checkpoints(
        family=FAMILIES[class_name],
        pipeline=pipeline,
        adapters=tuple(adapters),
        image_encoders=encoders,
        feature_extractors={
            name: base_processor or CLIPImageProcessor(size=e.config.image_size, crop_size=e.config.image_size)
            for name, e in encoders.items()
        },
    )


def read_adapter(file: Path) -> StateDict:
    """An adapter file as ``{"image_proj": ..., "ip_adapter": ...}``; ``.bin`` files are read without running code."""
    if file.suffix == ".safetensors":
        state_dict: StateDict = {"image_proj": {}, "ip_adapter": {}}
        with safe_open(file, framework="pt", device="cpu") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                section, _, rest = key.partition(".")
                if section in state_dict:
                    state_dict[section][rest] = tensors.get_tensor(key)
    else:
        try:
            state_dict = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise BundleError(f"{file} is not a file of plain tensors: {error}") from error
    if not all(isinstance(state_dict.get(part), dict) and state_dict[part] for part in ("image_proj", "ip_adapter")):
        raise BundleError(f"{file} is not an IP-Adapter: it lacks image_proj or ip_adapter weights")
    return {part: {k: v.float() for k, v in state_dict[part].items()} for part in ("image_proj", "ip_adapter")}


def adapter_kind(state_dict: StateDict) -> AdapterKind:
    """The kind of an adapter, by the keys that diffusers' loader goes by."""
    keys = state_dict["image_proj"].keys()
    if "proj.weight" in keys:
        return "plain"
    if "proj.3.weight" in keys:
        return "full_face"
    if "latents" in keys:
        return "plus"
    raise BundleError("ip_adapter: unknown layout of image_proj weights")


def embed_shape(kind: AdapterKind, encoder: CLIPVisionModelWithProjection | None) -> tuple[int, ...]:
    """Shape of one picture's embedding, as diffusers' ``encode_image`` gives it."""
    assert encoder is not None
    config = encoder.config
    if kind == "plain":
        return (config.projection_dim,)
    return ((config.image_size // config.patch_size) ** 2 + 1, config.hidden_size)


def check_fit(
    section: IPAdapterSection, state_dict: StateDict, unet: Any, encoder: CLIPVisionModelWithProjection | None
) -> None:
    """Refuse an adapter whose layers, cross-attention width or encoder width differ from those of the bundle."""
    name, config = f"ip_adapter {section.name}", unet.config
    layers = sum(1 for key in state_dict["ip_adapter"] if key.endswith(".to_k_ip.weight"))
    expected = sum(1 for key in unet.attn_processors if key.endswith("attn2.processor") and "motion" not in key)
    width = next(w for k, w in state_dict["ip_adapter"].items() if k.endswith(".to_k_ip.weight")).shape[1]
    if (layers, width) != (expected, config.cross_attention_dim):
        raise BundleError(
            f"{name}: made for {layers} attention layers of width {width}, but the base has {expected} of width "
            f"{config.cross_attention_dim}; take the file for this family (models/ for SD1.5, sdxl_models/ for SDXL)"
        )
    kind = adapter_kind(state_dict)
    if encoder is None:
        raise BundleError(f"{name}: a {kind} adapter needs an image encoder; set image_encoder_folder")
    projection = state_dict["image_proj"]
    if kind == "plain":
        wants, has, what = projection["proj.weight"].shape[1], encoder.config.projection_dim, "embeddings"
    else:
        key = "proj.0.weight" if kind == "full_face" else "proj_in.weight"
        wants, has, what = projection[key].shape[1], encoder.config.hidden_size, "hidden states"
    if wants != has:
        raise BundleError(
            f"{name}: wants {what} of width {wants}, but its image encoder gives {has}; "
            "only ip-adapter_sdxl goes with the ViT-bigG encoder of sdxl_models/image_encoder, all others with the "
            "ViT-H one of models/image_encoder"
        )


def _load_encoders(bundle: BundleFile) -> tuple[dict[str, CLIPVisionModelWithProjection], dict[str, str | None]]:
    """Each image encoder once, named after the first adapter that uses it, and the encoder of each adapter."""
    encoders: dict[str, CLIPVisionModelWithProjection] = {}
    by_place: dict[tuple[str, str], str] = {}
    names: dict[str, str | None] = {}
    for section in bundle.ip_adapter:
        place = bundle.image_encoder(section)
        if place is None:
            names[section.name] = None
            continue
        if place not in by_place:
            by_place[place] = section.name
            root, subfolder = place
            encoders[section.name] = CLIPVisionModelWithProjection.from_pretrained(root, subfolder=subfolder).float().eval()
        names[section.name] = by_place[place]
    return encoders, names
