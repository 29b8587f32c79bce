"""Stable Diffusion XL."""

from __future__ import annotations

from imprompt_export.families import ExportFamily

FAMILY = ExportFamily(
    name="sdxl",
    title="SDXL",
    pipelines=(
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
    ),
    text_encoders=(("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")),
    adapter_files="sdxl_models/ip-adapter*_sdxl",
    penultimate=True,
    pooled=True,
    adapts_middle=True,
)
