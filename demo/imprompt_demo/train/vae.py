"""The autoencoder: 64 x 64 pictures to 16 x 16 x 4 latents (AutoencoderKL)."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from .data import Pictures
from .loop import Plan, fit

PLAN = Plan(steps=1760, batch=16, rate=1.5e-3, average=0.995)
_KL_WEIGHT = 3e-4


def build() -> AutoencoderKL:
    """Untrained, about a million parameters."""
    torch.manual_seed(1)
    return AutoencoderKL(
        sample_size=64,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
        latent_channels=4,
        scaling_factor=0.18215,
    ).to(memory_format=torch.channels_last)


def load(folder: Path) -> AutoencoderKL:
    """The trained autoencoder, standardised."""
    model = build()
    model.load_state_dict(torch.load(folder / "vae.ready", weights_only=True))
    return model.eval().requires_grad_(False)


def train(folder: Path, data: Pictures, plan: Plan = PLAN) -> AutoencoderKL:
    """Distance of pixels and of neighbouring differences (crisp edges), and a small pull to the normal distribution."""
    model = build()

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(data.looks), (plan.batch,), generator=generator)
        real = data.batch(rows).contiguous(memory_format=torch.channels_last)
        posterior = model.encode(real).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        mean, spread = posterior.mean.float(), posterior.std.float()
        fake = model.decode(mean + spread * noise).sample.float()
        kl = 0.5 * (mean.square() + spread.square() - 1 - 2 * spread.log()).mean()
        rim = F.l1_loss(fake.diff(dim=2), real.diff(dim=2)) + F.l1_loss(fake.diff(dim=3), real.diff(dim=3))
        return F.l1_loss(fake, real) + 0.5 * rim + F.mse_loss(fake, real) + _KL_WEIGHT * kl

    fit("vae", folder, model, plan, loss, seed=1)
    torch.save(standardise(model, data).state_dict(), folder / "vae.ready")
    return model


@torch.no_grad()
def standardise(model: AutoencoderKL, data: Pictures) -> AutoencoderKL:
    """Give each latent channel mean 0 and, times `scaling_factor`, deviation 1.

    The pipelines know one factor and no offset, so both are folded into the 1 x 1 convolutions beside the latents.
    """
    latents = model.encode(data.batch(torch.arange(0, len(data.looks), 20))).latent_dist.mean
    mean, factor = latents.mean((0, 2, 3)), 1 / (model.config.scaling_factor * latents.std((0, 2, 3)))
    before, after = model.quant_conv, model.post_quant_conv
    before.bias[:4] = (before.bias[:4] - mean) * factor
    before.weight[:4] *= factor.view(-1, 1, 1, 1)
    before.bias[4:] += 2 * factor.log()
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight /= factor.view(1, -1, 1, 1)
    return model


@torch.no_grad()
def encode_all(model: AutoencoderKL, data: Pictures) -> Tensor:
    """Scaled latents of all pictures, [N, 4, 16, 16]."""
    parts = [model.encode(data.batch(rows)).latent_dist.mean for rows in torch.arange(len(data.looks)).split(250)]
    return torch.cat(parts) * model.config.scaling_factor
