"""The LCM-LoRA: distill the guided UNet into a LoRA that LCMScheduler runs in four steps.

As in https://arxiv.org/abs/2311.05556, the student learns where the teacher's trajectory ends. This world is so small
that the teacher can compute the end itself in a few guided DDIM steps, so the student's own prediction is not needed.
"""

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor

from . import diffusion
from .adapter import set_scale
from .data import LAYOUTS
from .loop import Plan, fit
from .text import Captions

PLAN = Plan(steps=2400, batch=12, rate=1e-3, average=0.995, weight_decay=0.0, save_every=50)
_RANK = 16
_FOUR_STEPS = (259, 499, 759, 999)  # LCMScheduler's timesteps for four steps
_GRID = 20  # LCMScheduler picks other numbers of steps from a grid of 50 of the 1,000 timesteps
_TEACHER_STEPS = 5
_GUIDANCE = 4.0
_SHORT_FULL_EMPTY = (0.7, 0.25, 0.05)
_NO_IMAGE = 0.2


def build(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Copy the base and add LoRA layers to all attention, feed-forward and residual weights."""
    torch.manual_seed(7)
    model = copy.deepcopy(unet).requires_grad_(False)
    layers = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
    layers += ["conv1", "conv2", "conv_shortcut", "time_emb_proj"]
    model.add_adapter(LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules=layers))
    return model


def train(
    folder: Path,
    unet: UNet2DConditionModel,
    latents: Tensor,
    captions: Captions,
    references: Tensor,
    plan: Plan = PLAN,
) -> UNet2DConditionModel:
    """Distill at a fixed guidance scale, so that the LoRA runs without guidance.

    `unet` is the base with the `plain` adapter, and `references` [N, 128] holds its image features of all pictures, so
    that the student also learns what guidance does to image prompts.
    """
    model = build(unet)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (plan.batch,), generator=generator)
        text, _ = captions.draw(rows, _SHORT_FULL_EMPTY, generator)
        sibling = rows // LAYOUTS * LAYOUTS + torch.randint(LAYOUTS, (plan.batch,), generator=generator)
        image = references[sibling].float() * (torch.rand(plan.batch, 1, generator=generator) >= _NO_IMAGE)
        scale = float(torch.rand(1, generator=generator))
        for network in (unet, model):
            set_scale(network, scale)
        noise = torch.randn(plan.batch, 4, 16, 16, generator=generator)
        timestep = torch.tensor(_FOUR_STEPS)[torch.randint(4, (plan.batch,), generator=generator)]
        other = torch.randint(1, 50, (plan.batch,), generator=generator) * _GRID + _GRID - 1
        timestep = torch.where(torch.rand(plan.batch, generator=generator) < 0.25, other, timestep)
        noisy = diffusion.noised(latents[rows], noise, timestep)
        empty = torch.zeros_like(image)
        target = end(unet, noisy, timestep, torch.cat([captions.blank(plan.batch), text]), torch.cat([empty, image]))
        velocity = model(noisy, timestep, text, added_cond_kwargs={"image_embeds": [image[:, None]]}).sample
        found, _ = split(velocity.float(), noisy, timestep)
        return F.huber_loss(found, target, delta=0.5)

    fit("lcm", folder, model, plan, loss, seed=7)
    return model


@torch.no_grad()
def end(unet: UNet2DConditionModel, noisy: Tensor, timestep: Tensor, text: Tensor, image: Tensor) -> Tensor:
    """Run the guided teacher from `noisy` to the end.

    `text` holds states of empty prompts, then of the captions; `image` features of no image, then of the references.
    """
    images = {"image_embeds": [image[:, None]]}
    for left in range(_TEACHER_STEPS, 0, -1):
        now = timestep * left // _TEACHER_STEPS
        both = unet(torch.cat([noisy, noisy]), torch.cat([now, now]), text, added_cond_kwargs=images).sample.float()
        empty, asked = both.chunk(2)
        clean, guessed = split(empty + _GUIDANCE * (asked - empty), noisy, now)
        noisy = diffusion.noised(clean, guessed, timestep * (left - 1) // _TEACHER_STEPS)
    return clean


def split(velocity: Tensor, noisy: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """Convert a predicted velocity to clean latents and noise."""
    alpha, sigma = diffusion.levels(timestep, 4)
    return alpha * noisy - sigma * velocity, sigma * noisy + alpha * velocity
