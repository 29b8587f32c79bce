"""Fit the linear map from latents to colors that previews use to the VAE of a bundle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

_IMAGES, _LATENT_SIZE = 8, 16
_SCALES = (1, 2, 4, 8)
"""Grid sizes of the random color fields that are summed: from uniform color to details of two latents."""


@torch.no_grad()
def fit_preview(vae: Any, factor: int) -> tuple[list[list[float]], list[float]]:
    """Fit RGB colors (-1 to 1) to the latents that the UNet sees, by least squares over smooth random pictures.

    Args:
        vae: a diffusers `AutoencoderKL` in float32.
        factor: pixels per latent along each side.

    Returns:
        Factors [channels, 3] and offset [3].
    """
    generator = torch.Generator().manual_seed(0)
    pictures = _color_fields(_LATENT_SIZE * factor, generator)
    latents = _scaled(torch.cat([vae.encode(p[None]).latent_dist.mean for p in pictures]), vae.config)
    colors = avg_pool2d(pictures, factor)
    columns = latents.transpose(0, 1).flatten(1).T.double()
    columns = torch.cat([columns, torch.ones(len(columns), 1, dtype=torch.float64)], dim=1)
    # gelsd also works if some channels do not matter (a rank below the number of channels).
    solution = torch.linalg.lstsq(columns, colors.transpose(0, 1).flatten(1).T.double(), driver="gelsd").solution
    *factors, offset = solution.tolist()
    return factors, offset


def _color_fields(size: int, generator: torch.Generator) -> Tensor:
    """Generate pictures [N, 3, size, size] of smooth random colors, -1 to 1."""
    fields = torch.zeros(_IMAGES, 3, size, size)
    for scale in _SCALES:
        grid = torch.rand(_IMAGES, 3, scale, scale, generator=generator) * 2 - 1
        fields += interpolate(grid, size=(size, size), mode="bilinear", align_corners=False)
    return fields.clamp(-1, 1)


def _scaled(latents: Tensor, config: Any) -> Tensor:
    """Scale latents of the VAE for the UNet (`prepare_latents` of diffusers' image-to-image pipelines)."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        latents = (latents - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1)
    return latents * config.scaling_factor
