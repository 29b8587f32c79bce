"""The edge ControlNet: a copy of the UNet's encoder, conditioned on white lines (https://arxiv.org/abs/2302.05543)."""

from pathlib import Path

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from . import diffusion
from .data import Pictures
from .loop import Plan, fit
from .text import Captions

PLAN = Plan(steps=3000, batch=16, rate=2e-3, average=0.995)
_SHORT_FULL_EMPTY = (0.15, 0.5, 0.35)


def build(unet: UNet2DConditionModel) -> ControlNetModel:
    """Initialize from the UNet's encoder; two strided convolutions reduce the 64 x 64 lines to 16 x 16."""
    torch.manual_seed(6)
    model = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 64))
    model.set_attn_processor(AttnProcessor())
    # The lines pass through two zero-initialized layers. One is enough; with both, learning starts much later.
    torch.nn.init.kaiming_normal_(model.controlnet_cond_embedding.conv_out.weight)
    return model


def train(
    folder: Path,
    unet: UNet2DConditionModel,
    data: Pictures,
    latents: Tensor,
    captions: Captions,
    plan: Plan = PLAN,
) -> ControlNetModel:
    """Train with many empty captions, so that the ControlNet learns from the lines what to draw, and not only where."""
    model = build(unet).requires_grad_(True)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (plan.batch,), generator=generator)
        text, _ = captions.draw(rows, _SHORT_FULL_EMPTY, generator)
        noise, timestep = diffusion.draw(plan.batch, (4, 16, 16), generator)
        clean = latents[rows]
        noisy = diffusion.noised(clean, noise, timestep)
        down, middle = model(noisy, timestep, text, controlnet_cond=data.edge_batch(rows), return_dict=False)
        prediction = unet(
            noisy, timestep, text, down_block_additional_residuals=down, mid_block_additional_residual=middle
        ).sample
        return diffusion.loss_v(prediction, clean, noise, timestep)

    fit("controlnet", folder, model, plan, loss, seed=6)
    return model
