"""The refiner of Stable Diffusion XL, which only has the second text encoder."""

from __future__ import annotations

from imprompt_export.families import ExportFamily

FAMILY = ExportFamily(
    name="sdxl_refiner",
    title="SDXL refiner",
    pipelines=("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
    text_encoders=(("text_encoder_2", "tokenizer_2"),),
    aesthetic_score=True,
    penultimate=True,
    pooled=True,
    adapts_middle=True,
)
