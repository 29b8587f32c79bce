"""The refiner of Stable Diffusion XL: one text encoder, and an aesthetic score in place of the target size."""

from __future__ import annotations

from dataclasses import dataclass

from imprompt_serving.families.sdxl import SDXL
from imprompt_serving.specs import GuidanceInputs


@dataclass(frozen=True, kw_only=True, slots=True)
class SDXLRefiner(SDXL):
    def time_ids(self, request: GuidanceInputs, pictures: int, *, guided: bool) -> list[tuple[float, ...]]:
        """Build the size conditioning [rows, 5] (`StableDiffusionXLImg2ImgPipeline._get_add_time_ids`)."""
        settings = request.settings
        original = settings.original_size or (settings.height, settings.width)
        negative: tuple[float, ...] = (
            *(settings.negative_original_size or original),
            *settings.negative_crops_coords_top_left,
            settings.negative_aesthetic_score,
        )
        positive: tuple[float, ...] = (*original, *settings.crops_coords_top_left, settings.aesthetic_score)
        return [negative] * (pictures if guided else 0) + [positive] * pictures


FAMILY = SDXLRefiner(
    prompts=("prompt",),
    parameters=(
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
        "denoising_start",
        "denoising_end",
        "original_size",
        "crops_coords_top_left",
        "negative_original_size",
        "negative_crops_coords_top_left",
        "aesthetic_score",
        "negative_aesthetic_score",
    ),
    needs_image=True,
)
