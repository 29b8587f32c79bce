"""The text-to-image UNet (UNet2DConditionModel) on 16 x 16 x 4 latents."""

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from . import diffusion
from .clip import WIDTH
from .loop import Plan, fit
from .text import Captions

PLAN = Plan(steps=14000, batch=16, rate=1.5e-3, average=0.998, warmup=100)
CHANNELS = (32, 64, 128)
HEADS = 2
_SHORT_FULL_EMPTY = (0.15, 0.77, 0.08)


def build() -> UNet2DConditionModel:
    """Build the untrained UNet, with 7 cross-attention layers of 2 heads at 16 x 16 and 8 x 8."""
    torch.manual_seed(3)
    model = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=HEADS,
        norm_num_groups=16,
    )
    model.set_attn_processor(AttnProcessor())  # faster than fused attention to train on a CPU at these sizes
    return model


def train(folder: Path, latents: Tensor, captions: Captions, plan: Plan = PLAN) -> UNet2DConditionModel:
    """Train for velocity prediction, with 8 % empty captions for classifier-free guidance."""
    model = build()

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (plan.batch,), generator=generator)
        text, _ = captions.draw(rows, _SHORT_FULL_EMPTY, generator)
        noise, timestep = diffusion.draw(plan.batch, (4, 16, 16), generator)
        clean = latents[rows]
        noisy = diffusion.noised(clean, noise, timestep)
        return diffusion.loss_v(model(noisy, timestep, text).sample, clean, noise, timestep)

    fit("unet", folder, model, plan, loss, seed=3)
    return model
