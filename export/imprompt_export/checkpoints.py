"""Load a set of checkpoints with diffusers' own loaders, and refuse those that do not fit together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from imprompt_export import adapters, checks, control, faces, lora, motion, t2i
from imprompt_export.base import load_base
from imprompt_export.bundle import BundleFile
from imprompt_export.errors import refusing
from imprompt_export.families import ExportFamily, family_of
from imprompt_serving.specs import AdapterKind


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedAdapter:
    """An adapter whose attention weights are loaded into the UNet.

    `embeds` are the shapes of the inputs of its `projection`, for one picture; `image_encoder` is a key of
    `Checkpoints.image_encoders`.
    """

    name: str
    kind: AdapterKind
    projection: torch.nn.Module
    image_encoder: str | None
    embeds: dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoints:
    """A diffusers pipeline with its adapters loaded and LoRAs fused, and the other models of a bundle by name."""

    family: ExportFamily
    pipeline: Any
    adapters: tuple[LoadedAdapter, ...]
    image_encoders: dict[str, CLIPVisionModelWithProjection]
    feature_extractors: dict[str, Any]
    controlnets: dict[str, ControlNetModel]
    t2i_adapters: dict[str, Any]
    motion_unet: Any | None
    face_models: dict[str, Path]
    loras: dict[str, dict[str, lora.Factors]]
    """Factors of the LoRAs that requests choose for the UNet, by name and layer."""
    notes: tuple[str, ...] = ()
    """Messages for the user."""


def load(bundle: BundleFile) -> Checkpoints:
    """Load everything that `bundle` names, in float32 on the CPU.

    Raises:
        BundleError: a checkpoint is missing, belongs to another family, or does not fit the UNet or its image encoder.
    """
    checks.check_checkpoints(bundle)
    pipeline = load_base(bundle)
    family = family_of(type(pipeline).__name__, pipeline.config)
    own_processor = getattr(pipeline, "feature_extractor", None)
    encoders, encoder_of = _load_encoders(bundle)
    loaded = _load_adapters(bundle, pipeline, encoders, encoder_of)
    notes = _fuse_carried_loras(pipeline)
    loras = {}
    for section in bundle.lora:
        what, file = f"lora {section.path}", bundle.lora_file(section)
        with refusing(what):
            if section.fused:
                lora.fuse(what, file, 1.0 if section.scale is None else section.scale, pipeline)
            else:
                loras[str(section.name)] = lora.unet_factors(what, file, pipeline)
    widths = {a.name: a.embeds["image_embeds"][-1] for a in loaded if a.kind.startswith("faceid")}
    used = {adapter.image_encoder for adapter in loaded}
    encoders = {name: model for name, model in encoders.items() if name in used}
    return Checkpoints(
        family=family,
        pipeline=pipeline,
        adapters=loaded,
        image_encoders=encoders,
        feature_extractors={
            name: own_processor or CLIPImageProcessor(size=e.config.image_size, crop_size=e.config.image_size)
            for name, e in encoders.items()
        },
        controlnets=control.load_controlnets(bundle, pipeline.unet),
        t2i_adapters=t2i.load_t2i_adapters(bundle, pipeline.unet, family),
        motion_unet=motion.load_motion_unet(bundle, pipeline.unet, family),
        face_models=faces.find_models(bundle, widths),
        loras=loras,
        notes=notes,
    )


def _load_encoders(bundle: BundleFile) -> tuple[dict[str, CLIPVisionModelWithProjection], dict[str, str]]:
    """Load each image encoder once, named after the first adapter that uses it; also return each adapter's encoder."""
    encoders: dict[str, CLIPVisionModelWithProjection] = {}
    by_place: dict[tuple[str, str], str] = {}
    encoder_of: dict[str, str] = {}
    for section in bundle.ip_adapter:
        place = bundle.image_encoder(section)
        if place is None:
            continue
        if place not in by_place:
            by_place[place] = section.name
            with refusing(f"ip_adapter {section.name}: its image encoder cannot be loaded"):
                model = CLIPVisionModelWithProjection.from_pretrained(place[0], subfolder=place[1])
            encoders[section.name] = model.float().eval()
        encoder_of[section.name] = by_place[place]
    return encoders, encoder_of


def _load_adapters(
    bundle: BundleFile, pipeline: Any, encoders: dict[str, CLIPVisionModelWithProjection], encoder_of: dict[str, str]
) -> tuple[LoadedAdapter, ...]:
    files = {section.name: bundle.adapter_file(section) for section in bundle.ip_adapter}
    layers = sum(1 for key in pipeline.unet.attn_processors if key.endswith("attn2.processor"))
    state_dicts = []
    for section in bundle.ip_adapter:
        state_dicts.append(adapters.read(files[section.name]))
        encoder = encoders.get(encoder_of.get(section.name, ""))
        adapters.check_fit(
            section.name,
            files[section.name].name,
            state_dicts[-1],
            layers,
            pipeline.unet.config.cross_attention_dim,
            None if encoder is None else encoder.config.to_dict(),
        )
    if not state_dicts:
        return ()
    with refusing("ip_adapter: diffusers cannot load it"):
        pipeline.load_ip_adapter(
            list(state_dicts),
            subfolder="",
            weight_name=[files[section.name].name for section in bundle.ip_adapter],
            image_encoder_folder=None,
        )
    projections = pipeline.unet.encoder_hid_proj.image_projection_layers
    loaded = []
    for section, state_dict, projection in zip(bundle.ip_adapter, state_dicts, projections, strict=True):
        kind = adapters.kind_of(state_dict, files[section.name].name)
        encoder = None if kind == "faceid" else encoder_of.get(section.name)
        if kind.startswith("faceid_plus"):
            projection.shortcut = kind == "faceid_plusv2"
        embeds = adapters.embed_shapes(kind, state_dict, encoders.get(encoder or ""))
        loaded.append(
            LoadedAdapter(name=section.name, kind=kind, projection=projection, image_encoder=encoder, embeds=embeds)
        )
    return tuple(loaded)


def _fuse_carried_loras(pipeline: Any) -> tuple[str, ...]:
    """Fuse the LoRAs inside FaceID adapters that diffusers has made active; return messages for the user."""
    carried = sorted(getattr(pipeline.unet, "peft_config", {}))
    if not carried:
        return ()
    names = list(pipeline.get_active_adapters())
    pipeline.set_adapters(names, [1.0] * len(names))
    pipeline.fuse_lora(adapter_names=names)
    pipeline.unload_lora_weights()
    if len(carried) == len(names):
        return ()
    return (f"of the LoRAs inside the adapters, only {', '.join(names)} is used, as in diffusers",)
