"""Stable Diffusion 1.x, and 2.x, which only differs in what its configurations say."""

from __future__ import annotations

from imprompt_export.families import ExportFamily

FAMILY = ExportFamily(
    name="sd15",
    title="SD1.5",
    pipelines=(
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "LatentConsistencyModelPipeline",
    ),
    text_encoders=(("text_encoder", "tokenizer"),),
    adapter_files="models/ip-adapter*_sd15",
    clips=True,
)
