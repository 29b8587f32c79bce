"""Stable Diffusion XL. Its refiner would be a separate family, which is not supported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from imprompt_export.errors import BundleError
from imprompt_export.families import ExportFamily


@dataclass(frozen=True, kw_only=True, slots=True)
class SDXL(ExportFamily):
    def check_base(self, index: Mapping[str, Any]) -> None:
        if not all(index.get("text_encoder") or (None,)) or index.get("requires_aesthetics_score"):
            raise BundleError(
                "base: an SDXL refiner (one text encoder, an aesthetics score) is not supported; use the SDXL base"
            )
        # Not super(): with `slots`, dataclass creates a new class, which super() in this body does not know.
        ExportFamily.check_base(self, index)


FAMILY = SDXL(
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
