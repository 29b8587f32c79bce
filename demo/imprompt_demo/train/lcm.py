"""The LCM-LoRA: consistency distillation of the guided UNet into a LoRA (https://arxiv.org/abs/2311.05556).

The teacher takes one guided DDIM step from a noisy latent; the student must see the same clean picture from both ends.
"""

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor

from . import diffusion
from .loop import Plan, fit
from .text import Captions

PLAN = Plan(steps=1500, batch=12, rate=1e-3, average=0.98, weight_decay=0.0)
_RANK = 16
_GRID = 20  # timesteps between two points of the teacher's grid: 50 of 1,000, LCMScheduler's default
_STEP = 6 * _GRID  # of the teacher: few hops from noise to picture, so that what is learnt at the end arrives soon
_GUIDANCE = (2.0, 5.0)
_SHORT_FULL_EMPTY = (0.6, 0.35, 0.05)


def build(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy of the base with LoRA layers beside all attention, feed-forward and residual weights."""
    torch.manual_seed(7)
    model = copy.deepcopy(unet).requires_grad_(False)
    layers = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
    layers += ["conv1", "conv2", "conv_shortcut", "time_emb_proj"]
    model.add_adapter(LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules=layers))
    return model


def train(
    folder: Path, unet: UNet2DConditionModel, latents: Tensor, captions: Captions, plan: Plan = PLAN
) -> UNet2DConditionModel:
    """Distil; the guidance scale of each row is drawn at random, so the LoRA works at guidance 1."""
    model = build(unet)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (plan.batch,), generator=generator)
        text, _ = captions.draw(rows, _SHORT_FULL_EMPTY, generator)
        noise = torch.randn(plan.batch, 4, 16, 16, generator=generator)
        late = torch.randint(1, 50, (plan.batch,), generator=generator) * _GRID + _GRID - 1
        early = (late - _STEP).clamp(min=_GRID - 1)
        noisy = diffusion.noised(latents[rows], noise, late)
        low, high = _GUIDANCE
        guidance = low + (high - low) * torch.rand(plan.batch, 1, 1, 1, generator=generator)
        with torch.no_grad():
            both = unet(
                torch.cat([noisy, noisy]), torch.cat([late, late]), torch.cat([captions.blank(plan.batch), text])
            ).sample.float()
            empty, asked = both.chunk(2)
            clean, guessed = split(empty + guidance * (asked - empty), noisy, late)
            stepped = diffusion.noised(clean, guessed, early)
            target, _ = split(model(stepped, early, text).sample.float(), stepped, early)
        found, _ = split(model(noisy, late, text).sample.float(), noisy, late)
        return F.huber_loss(found, target, delta=0.5)

    fit("lcm", folder, model, plan, loss, seed=7)
    return model


def split(velocity: Tensor, noisy: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """The clean latents and the noise that a predicted velocity stands for."""
    alpha, sigma = diffusion.levels(timestep, 4)
    return alpha * noisy - sigma * velocity, sigma * noisy + alpha * velocity
