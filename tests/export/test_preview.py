"""The preview map is fitted to the bundle's own VAE."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.functional import avg_pool2d

import imprompt_demo
from imprompt_bench.rig import PREVIEW
from imprompt_demo import world
from imprompt_export.preview import fit_preview

MIX = torch.tensor([[1.0, 0.2, 0.0], [0.0, -1.0, 0.3], [0.5, 0.0, 2.0], [0.1, 0.1, -0.4]])


class LinearVAE:
    """A VAE whose latents are a linear mix of colors."""

    def __init__(self, **config: Any) -> None:
        self.config = SimpleNamespace(get=config.get, scaling_factor=config["scaling_factor"])

    def encode(self, pictures: Tensor) -> Any:
        mean = torch.einsum("nchw,dc->ndhw", avg_pool2d(pictures, 8), MIX) + 0.25
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean))


@pytest.mark.parametrize(
    "config",
    [{"scaling_factor": 0.5}, {"scaling_factor": 2.0, "latents_mean": [0.1] * 4, "latents_std": [3.0] * 4}],
    ids=["scaled", "mean and deviation"],
)
def test_fit_inverts_a_linear_vae(config: dict[str, Any]) -> None:
    factors, offset = fit_preview(LinearVAE(**config), 8)
    colors = torch.rand(3, 5, dtype=torch.float64) * 2 - 1
    latents = MIX.double() @ colors + 0.25
    if "latents_mean" in config:
        latents = (latents - 0.1) / 3.0
    latents *= config["scaling_factor"]
    shown = torch.tensor(factors, dtype=torch.float64).T @ latents + torch.tensor(offset)[:, None]
    torch.testing.assert_close(shown, colors, atol=1e-4, rtol=0)


def test_previews_of_the_embedded_bundle_have_its_own_colors() -> None:
    """The fitted map is much closer than the factors for Stable Diffusion 1.5's VAE."""
    folder = Path(imprompt_demo.__file__).parent / "bundle/checkpoints/base/vae"
    vae = AutoencoderKL.from_pretrained(folder)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    factors, offset = fit_preview(vae, factor)
    pixels = np.stack([world.picture(seed).pixels for seed in range(4)])
    pictures = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(pictures).latent_dist.mean * vae.config.scaling_factor
    picture = avg_pool2d(pictures, factor)

    def distance(factors: Any, offset: Any) -> float:
        shown = torch.einsum("nchw,cd->ndhw", latents, torch.tensor(factors)) + torch.tensor(offset).view(1, 3, 1, 1)
        return float((shown.clamp(-1, 1) - picture).abs().mean())

    own, other = distance(factors, offset), distance(PREVIEW, [0.0, 0.0, 0.0])
    assert own < 0.7 * other
