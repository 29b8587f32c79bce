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
    """Build the untrained autoencoder of about a million parameters."""
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
    """Load the trained autoencoder with standardized latents."""
    model = build()
    model.load_state_dict(torch.load(folder / "vae.ready", weights_only=True))
    return model.eval().requires_grad_(False)


def train(folder: Path, data: Pictures, plan: Plan = PLAN) -> AutoencoderKL:
    """Train on pixel distance, distance of neighboring differences (for crisp edges), and a small KL term."""
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
    torch.save(standardize(model, data).state_dict(), folder / "vae.ready")
    return model


@torch.no_grad()
def standardize(model: AutoencoderKL, data: Pictures) -> AutoencoderKL:
    """Give each latent channel zero mean and, after multiplying by `scaling_factor`, unit variance.

    The pipelines support a single factor and no offset, so both are folded into the adjacent 1 x 1 convolutions.
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
    """Encode all pictures as scaled latents [N, 4, 16, 16]."""
    parts = [model.encode(data.batch(rows)).latent_dist.mean for rows in torch.arange(len(data.looks)).split(250)]
    return torch.cat(parts) * model.config.scaling_factor
