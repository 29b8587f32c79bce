"""What a job's pictures look like so far: small, rough and cheap, without the VAE."""

from __future__ import annotations

import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor

LONGEST_SIDE = 256
QUALITY = 80

_RGB = {
    "sd15": (
        ((0.3512, 0.2297, 0.3227), (0.3250, 0.4974, 0.2350), (-0.2829, 0.1762, 0.2721), (-0.2120, -0.2616, -0.7177)),
        (0.0, 0.0, 0.0),
    ),
    "sdxl": (
        ((0.3651, 0.4232, 0.4341), (-0.2533, -0.0042, 0.1068), (0.1076, 0.1111, -0.0362), (-0.3165, -0.2492, -0.2188)),
        (0.1084, -0.0175, -0.0011),
    ),
}
"""Red, green and blue by latent channel, and offsets: the linear fit to each family's VAE that ComfyUI uses
(comfy/latent_formats.py). For a VAE that was trained anew the colours mean little, the shapes still do."""


def predicted_latents(scheduler: Any, timestep: Tensor, model_input: Tensor, noise_pred: Tensor) -> Tensor:
    """The clean latents that a UNet's output stands for.

    Whatever the scheduler, ``scale_model_input`` makes the UNet's input ``sqrt(a) x + sqrt(1 - a) noise`` with
    ``a = alphas_cumprod[timestep]``.
    """
    alpha = scheduler.alphas_cumprod[timestep.round().long().clamp(0, len(scheduler.alphas_cumprod) - 1).cpu()]
    signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
    if scheduler.config.prediction_type == "sample":
        return noise_pred
    if scheduler.config.prediction_type == "v_prediction":
        return signal * model_input - noise * noise_pred
    return (model_input - noise * noise_pred) / signal


def previews(latents: Tensor, family: str) -> list[bytes]:
    """JPEG of each picture of ``latents`` [N, C, h, w]; of clips [N, C, F, h, w] the first frame."""
    if latents.ndim == 5:
        latents = latents[:, :, 0]
    factors, offsets = _RGB[family]
    rgb = torch.einsum("nchw,cd->nhwd", latents.float().cpu(), torch.tensor(factors)) + torch.tensor(offsets)
    pixels = ((rgb + 1) * 127.5).nan_to_num().clamp(0, 255).to(torch.uint8).numpy()
    return [_jpeg(Image.fromarray(picture)) for picture in pixels]


def _jpeg(image: Image.Image) -> bytes:
    """Enlarged (a latent stands for 8 x 8 pixels) as far as ``LONGEST_SIDE`` allows."""
    scale = min(8.0, LONGEST_SIDE / max(image.size))
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()
