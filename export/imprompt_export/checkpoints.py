"""Load a checkpoint set with diffusers' own loaders, and refuse what does not fit together before any export."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, DiffusionPipeline
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from imprompt_export import adapters, control, faces, motion, t2i
from imprompt_export.bundle import BundleError, BundleFile
from imprompt_serving.specs import AdapterKind

FAMILIES = {
    "StableDiffusionPipeline": "sd15",
    "StableDiffusionImg2ImgPipeline": "sd15",
    "StableDiffusionInpaintPipeline": "sd15",
    "LatentConsistencyModelPipeline": "sd15",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLImg2ImgPipeline": "sdxl",
    "StableDiffusionXLInpaintPipeline": "sdxl",
}
"""Pipelines that a base folder may name; the tasks are the server's own, whatever it names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedAdapter:
    """An adapter whose weights sit in the UNet: its projection with the inputs of it, and its image encoder."""

    name: str
    kind: AdapterKind
    projection: torch.nn.Module
    image_encoder: str | None
    embeds: dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoints:
    """A diffusers pipeline with its adapters loaded and its LoRAs fused, and the image encoders by name."""

    family: str
    pipeline: Any
    adapters: tuple[LoadedAdapter, ...]
    image_encoders: dict[str, CLIPVisionModelWithProjection]
    feature_extractors: dict[str, Any]
    controlnets: dict[str, ControlNetModel]
    t2i_adapters: dict[str, Any]
    motion_unet: Any | None
    face_models: dict[str, Path]


def load(bundle: BundleFile) -> Checkpoints:
    """Load everything that ``bundle`` names, in float32 on the CPU.

    Raises:
        BundleError: a checkpoint is missing, of another family, or does not fit the UNet or its image encoder.
    """
    pipeline = _load_base(bundle)
    own_processor = getattr(pipeline, "feature_extractor", None)
    encoders, encoder_of = _load_encoders(bundle)
    loaded = _load_adapters(bundle, pipeline, encoders, encoder_of)
    _fuse_loras(bundle, pipeline)
    widths = {a.name: a.embeds["image_embeds"][-1] for a in loaded if a.kind.startswith("faceid")}
    used = {adapter.image_encoder for adapter in loaded}
    encoders = {name: model for name, model in encoders.items() if name in used}
    return Checkpoints(
        family=FAMILIES[type(pipeline).__name__],
        pipeline=pipeline,
        adapters=loaded,
        image_encoders=encoders,
        feature_extractors={
            name: own_processor or CLIPImageProcessor(size=e.config.image_size, crop_size=e.config.image_size)
            for name, e in encoders.items()
        },
        controlnets=control.load_controlnets(bundle, pipeline.unet),
        t2i_adapters=t2i.load_t2i_adapters(bundle, pipeline.unet),
        motion_unet=motion.load_motion_unet(bundle, pipeline.unet),
        face_models=faces.find_models(bundle, widths),
    )


def _load_base(bundle: BundleFile) -> Any:
    try:
        pipeline = DiffusionPipeline.from_pretrained(bundle.locate(bundle.base), dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise BundleError(f"base: {bundle.base} cannot be loaded as a diffusers pipeline: {error}") from error
    name = type(pipeline).__name__
    if name not in FAMILIES:
        raise BundleError(f"base: {name} is not served; folders of {', '.join(sorted(FAMILIES))} are")
    channels = pipeline.vae.config.latent_channels
    if pipeline.unet.config.in_channels not in (channels, 2 * channels + 1):
        raise BundleError(
            f"base: a UNet of {pipeline.unet.config.in_channels} input channels is not served; "
            f"{channels} (text-to-image) and {2 * channels + 1} (inpainting) are"
        )
    if pipeline.text_encoder is None or pipeline.config.get("requires_aesthetics_score"):
        raise BundleError("base: an SDXL refiner (one text encoder, an aesthetics score) is not served; its base is")
    # Pipelines correct outdated configurations, each in its own way: the denoiser does what the task's one does.
    pipeline.scheduler = type(pipeline.scheduler).from_pretrained(bundle.locate(bundle.base), subfolder="scheduler")
    return pipeline


def _load_encoders(bundle: BundleFile) -> tuple[dict[str, CLIPVisionModelWithProjection], dict[str, str]]:
    """Each image encoder once, named after the first adapter that uses it, and the encoder of each adapter."""
    encoders: dict[str, CLIPVisionModelWithProjection] = {}
    by_place: dict[tuple[str, str], str] = {}
    encoder_of: dict[str, str] = {}
    for section in bundle.ip_adapter:
        place = bundle.image_encoder(section)
        if place is None:
            continue
        if place not in by_place:
            by_place[place] = section.name
            model = CLIPVisionModelWithProjection.from_pretrained(place[0], subfolder=place[1])
            encoders[section.name] = model.float().eval()
        encoder_of[section.name] = by_place[place]
    return encoders, encoder_of


def _load_adapters(
    bundle: BundleFile, pipeline: Any, encoders: dict[str, CLIPVisionModelWithProjection], encoder_of: dict[str, str]
) -> tuple[LoadedAdapter, ...]:
    state_dicts = []
    for section in bundle.ip_adapter:
        state_dicts.append(adapters.read(bundle.adapter_file(section)))
        adapters.check_fit(section, state_dicts[-1], pipeline.unet, encoders.get(encoder_of.get(section.name, "")))
    if not state_dicts:
        return ()
    pipeline.load_ip_adapter(
        list(state_dicts),
        subfolder="",
        weight_name=[section.weight_name for section in bundle.ip_adapter],
        image_encoder_folder=None,
    )
    projections = pipeline.unet.encoder_hid_proj.image_projection_layers
    loaded = []
    for section, state_dict, projection in zip(bundle.ip_adapter, state_dicts, projections, strict=True):
        kind = adapters.kind_of(state_dict, section.weight_name)
        encoder = None if kind == "faceid" else encoder_of[section.name]
        if kind.startswith("faceid_plus"):
            projection.shortcut = kind == "faceid_plusv2"
        embeds = adapters.embed_shapes(kind, state_dict, encoders.get(encoder or ""))
        loaded.append(
            LoadedAdapter(name=section.name, kind=kind, projection=projection, image_encoder=encoder, embeds=embeds)
        )
    return tuple(loaded)


def _fuse_loras(bundle: BundleFile, pipeline: Any) -> None:
    """Fuse the LoRAs of the bundle, and those that FaceID adapters brought (as active as diffusers made them)."""
    carried = sorted(getattr(pipeline.unet, "peft_config", {}))
    names = list(pipeline.get_active_adapters()) if carried else []
    if len(carried) > len(names):
        warnings.warn(f"of the adapters' own LoRAs only {names} is used, as in diffusers", stacklevel=2)
    scales = [1.0] * len(names)
    for index, section in enumerate(bundle.lora):
        arguments = {"weight_name": section.weight_name, "subfolder": section.subfolder}
        try:
            pipeline.load_lora_weights(
                bundle.locate(section.path),
                adapter_name=f"lora_{index}",
                **{key: value for key, value in arguments.items() if value is not None},
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise BundleError(f"lora: {section.path} cannot be loaded: {error}") from error
        names.append(f"lora_{index}")
        scales.append(section.scale)
    if names:
        pipeline.set_adapters(names, scales)
        pipeline.fuse_lora(adapter_names=names)
        pipeline.unload_lora_weights()
