"""The noise schedule of all models: 1,000 steps, linear betas, v-prediction (https://arxiv.org/abs/2202.00512).

The last step is nearly pure noise, so that flat bright and dark backgrounds are reproduced faithfully.
"""

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor

SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,  # the pipelines require it; trailing spacing ignores it
}


def scheduler() -> DDIMScheduler:
    """Build the bundle's default scheduler."""
    return DDIMScheduler(**SCHEDULE)


def noised(clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """Add noise to each row for its own timestep."""
    alpha, sigma = levels(timestep, clean.dim())
    return alpha * clean + sigma * noise


def loss_v(prediction: Tensor, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """Compute the mean squared error of the predicted velocity."""
    alpha, sigma = levels(timestep, clean.dim())
    return F.mse_loss(prediction.float(), alpha * noise - sigma * clean)


_ALPHAS = DDIMScheduler(**SCHEDULE).alphas_cumprod


def levels(timestep: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """Return the signal and noise level of each row, shaped to broadcast over a tensor with `dims` axes."""
    alphas = _ALPHAS[timestep].view(-1, *[1] * (dims - 1))
    return alphas.sqrt(), (1 - alphas).sqrt()


def draw(rows: int, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw noise [rows, *shape] and timesteps [rows]: half of them uniform, half from 500 up, where prompts matter."""
    places = (torch.arange(rows) + torch.rand(rows, generator=generator)) / rows
    part = (2 * places) % 1
    part = torch.where(places < 0.5, part, 0.5 + part / 2)
    return torch.randn(rows, *shape, generator=generator), (part * 1000).long().clamp(0, 999)
