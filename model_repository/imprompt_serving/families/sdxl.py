"""Stable Diffusion XL: two text encoders, size conditioning, defaults of `StableDiffusionXLPipeline` and others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from imprompt_serving.families import Family
from imprompt_serving.families._unet import first_up_block, last_down_block
from imprompt_serving.specs import Bundle, CrossAttention, GuidanceInputs

if TYPE_CHECKING:
    from torch import Tensor

    from imprompt_serving.job_request import Task


@dataclass(frozen=True, kw_only=True, slots=True)
class SDXL(Family):
    def default_guidance_scale(self, task: Task, *, controlled: bool) -> float:
        return 5.0 if controlled or task != "inpainting" else 7.5

    def default_strength(self, task: Task, *, controlled: bool) -> float:
        if task == "inpainting":
            return 0.9999
        return 0.8 if controlled else 0.3

    def default_conditioning_scale(self, task: Task) -> float:
        return 0.8 if task == "image-to-image" else 1.0

    def text_shapes(self, bundle: Bundle) -> dict[str, tuple[int, ...]]:
        width = sum(encoder.hidden_size for encoder in bundle.text_encoders)
        assert bundle.pooled_size is not None  # set in every bundle of this family
        return {
            "prompt_embeds": (bundle.text_encoders[0].max_length, width),
            "pooled_prompt_embeds": (bundle.pooled_size,),
        }

    def join_text(self, outputs: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Concatenate the hidden states; the pooled embedding comes from the second encoder."""
        return {
            "prompt_embeds": np.concatenate([output["hidden_states"] for output in outputs], axis=-1),
            "pooled_prompt_embeds": outputs[-1]["text_embeds"],
        }

    def text_inputs(
        self, request: GuidanceInputs, embeds: Callable[[str], Tensor], *, pictures: int, guided: bool
    ) -> dict[str, Tensor]:
        import torch

        return {
            "encoder_hidden_states": embeds("prompt_embeds"),
            "text_embeds": embeds("pooled_prompt_embeds"),
            "time_ids": torch.tensor(self.time_ids(request, pictures, guided=guided), dtype=torch.float32),
        }

    def time_ids(self, request: GuidanceInputs, pictures: int, *, guided: bool) -> list[tuple[float, ...]]:
        """Build the size conditioning [rows, 6] like diffusers' pipeline for the task (`_get_add_time_ids`).

        For text-to-image, negative sizes apply only if both are given, and negative and positive rows alternate. With
        a start picture, each negative size applies on its own, with the positive crop; inpainting with ControlNets
        ignores them.
        """
        sizes, actual = request.settings, (request.settings.height, request.settings.width)
        original, target = sizes.original_size or actual, sizes.target_size or actual
        positive: tuple[float, ...] = (*original, *sizes.crops_coords_top_left, *target)
        negative_original, negative_target = sizes.negative_original_size, sizes.negative_target_size
        negative = positive
        if request.task == "text-to-image":
            if negative_original is not None and negative_target is not None:
                negative = (*negative_original, *sizes.negative_crops_coords_top_left, *negative_target)
            rows = [negative, positive] * pictures
        else:
            if not (request.task == "inpainting" and request.controls):
                negative = (
                    *(negative_original or original),
                    *sizes.crops_coords_top_left,
                    *(negative_target or target),
                )
            rows = [negative] * pictures + [positive] * pictures
        return rows if guided else [positive] * pictures

    def scale_latents(self, latents: Tensor, bundle: Bundle) -> Tensor:
        import torch

        if not bundle.vae_latents_mean:
            return latents * bundle.vae_scaling_factor
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (bundle.vae_latents_mean, bundle.vae_latents_std))
        return (latents - mean) * bundle.vae_scaling_factor / std

    def scheduler_corrections(self, config: Mapping[str, Any], request: GuidanceInputs) -> dict[str, Any]:
        return {}

    def layer_roles(self, layers: Sequence[CrossAttention]) -> dict[str, frozenset[str]]:
        """Name the layers that InstantStyle uses (https://arxiv.org/abs/2404.02733)."""
        style = frozenset(name for name in first_up_block(layers) if name.split(".")[2:4] == ["attentions", "1"])
        return {"composition": last_down_block(layers), "style": style}


FAMILY = SDXL(
    prompts=("prompt", "prompt_2"),
    parameters=(
        "prompt_2",
        "negative_prompt_2",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
        "denoising_start",
        "denoising_end",
        "original_size",
        "crops_coords_top_left",
        "target_size",
        "negative_original_size",
        "negative_crops_coords_top_left",
        "negative_target_size",
    ),
)
