"""The motion adapter: train temporal attention between frozen spatial layers (https://arxiv.org/abs/2307.04725)."""

import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, MotionAdapter, UNet2DConditionModel, UNetMotionModel
from numpy.typing import NDArray
from torch import Tensor

from ..world import clip, render, sample_layout, sample_look
from . import diffusion
from .adapter import set_scale, use_plain_attention
from .clip import Towers
from .loop import Plan, fit
from .text import Captions, captions
from .unet import CHANNELS, HEADS

PLAN = Plan(steps=4000, batch=2, rate=8e-4, average=0.998, save_every=50)
FRAMES = 16
CLIPS = 300
_SHORT_FULL_EMPTY = (0.65, 0.2, 0.15)
_NO_IMAGE = 0.25
_BETWEEN = 0.5
"""Weight of the differences between neighboring frames."""


def untrained() -> MotionAdapter:
    """Build motion layers that do nothing yet."""
    torch.manual_seed(8)
    return MotionAdapter(
        block_out_channels=CHANNELS,
        motion_layers_per_block=1,
        motion_num_attention_heads=HEADS,
        motion_norm_num_groups=16,
        motion_max_seq_length=FRAMES,
        use_motion_mid_block=True,
    )


def build(unet: UNet2DConditionModel, layers: MotionAdapter | None = None) -> UNetMotionModel:
    """Add motion layers, untrained ones by default, to the frozen base."""
    model = UNetMotionModel.from_unet2d(unet, layers or untrained())
    use_plain_attention(model)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("motion_modules" in name)
    return model


@torch.no_grad()
def clips(vae: AutoencoderKL, towers: Towers) -> dict[str, Tensor]:
    """Render and encode clips, captions, and as image prompts other pictures with the same looks.

    Returns `latents` [CLIPS, 4, 16, 16, 16] (axis 2: frames), `references` [CLIPS, 128], and the fields of `Captions`.
    """
    rng = random.Random(8)
    looks, layouts = [sample_look(rng) for _ in range(CLIPS)], [sample_layout(rng) for _ in range(CLIPS)]
    latents, references = [], []
    for look, layout in zip(looks, layouts, strict=True):
        encoded = vae.encode(_pixels(clip(look, layout, FRAMES))).latent_dist.mean
        latents.append(encoded.transpose(0, 1) * vae.config.scaling_factor)
        reference = render(look, sample_layout(rng)).pixels
        references.append(towers.vision(_pixels(reference[None])).image_embeds)
    texts = captions(towers, looks, layouts)
    return {"latents": torch.stack(latents), "references": torch.cat(references), **texts}


def _pixels(frames: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2))).float().div(127.5).sub(1)


def train(folder: Path, unet: UNet2DConditionModel, material: dict[str, Tensor], plan: Plan = PLAN) -> UNetMotionModel:
    """Train the motion layers on `material` from `clips`, with and without image prompts.

    `unet` is the base with the `plain` adapter. Flicker is an error that differs between neighboring frames, so their
    differences count in addition.
    """
    model = build(unet)
    fields = dict(material)
    latents, references = fields.pop("latents"), fields.pop("references")
    texts = Captions(**fields)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (plan.batch,), generator=generator)
        clean = latents[rows]
        text, _ = texts.draw(rows, _SHORT_FULL_EMPTY, generator)
        image = references[rows] * (torch.rand(plan.batch, 1, generator=generator) >= _NO_IMAGE)
        set_scale(model, float(torch.rand(1, generator=generator)))
        noise, timestep = diffusion.draw(plan.batch, tuple(clean.shape[1:]), generator)
        noisy = diffusion.noised(clean, noise, timestep)
        prediction = model(
            noisy,
            timestep,
            text.repeat_interleave(FRAMES, 0),
            added_cond_kwargs={"image_embeds": [image[:, None]]},
        ).sample
        between = diffusion.loss_v(prediction.diff(dim=2), clean.diff(dim=2), noise.diff(dim=2), timestep)
        return diffusion.loss_v(prediction, clean, noise, timestep) + _BETWEEN * between

    fit("motion", folder, model, plan, loss, seed=8)
    return model
