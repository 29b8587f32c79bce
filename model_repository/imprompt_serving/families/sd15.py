"""Stable Diffusion 1.x and 2.x: one text encoder; defaults of `StableDiffusionPipeline` and related pipelines."""

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
class SD15(Family):
    def default_guidance_scale(self, task: Task, *, controlled: bool) -> float:
        return 7.5

    def default_strength(self, task: Task, *, controlled: bool) -> float:
        return 1.0 if task == "inpainting" else 0.8

    def default_conditioning_scale(self, task: Task) -> float:
        return {"image-to-image": 0.8, "inpainting": 0.5}.get(task, 1.0)

    def text_shapes(self, bundle: Bundle) -> dict[str, tuple[int, ...]]:
        (encoder,) = bundle.text_encoders
        return {"prompt_embeds": (encoder.max_length, encoder.hidden_size)}

    def join_text(self, outputs: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return {"prompt_embeds": outputs[0]["hidden_states"]}

    def text_inputs(
        self, request: GuidanceInputs, embeds: Callable[[str], Tensor], *, pictures: int, guided: bool
    ) -> dict[str, Tensor]:
        return {"encoder_hidden_states": embeds("prompt_embeds")}

    def scale_latents(self, latents: Tensor, bundle: Bundle) -> Tensor:
        return latents * bundle.vae_scaling_factor

    def scheduler_corrections(self, config: Mapping[str, Any], request: GuidanceInputs) -> dict[str, Any]:
        """Return the corrections; the pipelines for ControlNets and clips make none."""
        if request.controls or request.frames is not None:
            return {}
        corrected = {"steps_offset": 1}
        corrected |= {"skip_prk_steps": True} if request.task == "inpainting" else {"clip_sample": False}
        return {name: value for name, value in corrected.items() if config.get(name, value) != value}

    def layer_roles(self, layers: Sequence[CrossAttention]) -> dict[str, frozenset[str]]:
        """Name the layers that ComfyUI IPAdapter Plus uses (https://github.com/cubiq/ComfyUI_IPAdapter_plus)."""
        composition, names = last_down_block(layers), frozenset(layer.name for layer in layers)
        return {"composition": composition, "style": names - composition - first_up_block(layers)}


FAMILY = SD15(prompts=("prompt",))
