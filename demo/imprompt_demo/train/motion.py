"""The motion adapter: train temporal attention between frozen spatial layers (https://arxiv.org/abs/2307.04725)."""

import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, MotionAdapter, UNet2DConditionModel, UNetMotionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from ..world import clip, sample_layout, sample_look
from . import diffusion
from .clip import Towers
from .loop import Plan, fit
from .unet import CHANNELS, HEADS
from .words import full_caption, short_caption

PLAN = Plan(steps=1600, batch=1, rate=1e-3, average=0.99)
FRAMES = 16
CLIPS = 250


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
    model.set_attn_processor(AttnProcessor())
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("motion_modules" in name)
    return model


@torch.no_grad()
def clips(vae: AutoencoderKL, towers: Towers) -> tuple[Tensor, Tensor]:
    """Render and encode clips: latents [CLIPS, 4, 16, 16, 16] (axis 2: frames) and caption states [CLIPS, 32, 128]."""
    rng = random.Random(8)
    latents, texts = [], []
    for _ in range(CLIPS):
        look, layout = sample_look(rng), sample_layout(rng)
        frames = clip(look, layout, FRAMES)
        pixels = torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2))).float().div(127.5).sub(1)
        latents.append(vae.encode(pixels).latent_dist.mean.transpose(0, 1) * vae.config.scaling_factor)
        texts.append(full_caption(look, layout, rng) if rng.random() < 0.5 else short_caption(layout, rng))
    return torch.stack(latents), towers.text(towers.tokens(texts)).last_hidden_state


def train(
    folder: Path, unet: UNet2DConditionModel, material: tuple[Tensor, Tensor], plan: Plan = PLAN
) -> UNetMotionModel:
    """Train the motion layers on `material`, the latents and caption states from `clips`."""
    model = build(unet)
    latents, texts = material

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (plan.batch,), generator=generator)
        clean = latents[rows]
        noise, timestep = diffusion.draw(plan.batch, tuple(clean.shape[1:]), generator)
        noisy = diffusion.noised(clean, noise, timestep)
        states = texts[rows].repeat_interleave(FRAMES, 0)
        return diffusion.loss_v(model(noisy, timestep, states).sample, clean, noise, timestep)

    fit("motion", folder, model, plan, loss, seed=8)
    return model
