"""Previews of a job's pictures: small, rough, and cheap, because they do not need the VAE."""

from __future__ import annotations

import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from imprompt_serving.gpu import download
from imprompt_serving.specs import Bundle

LONGEST_SIDE = 256
"""Of a preview, in pixels."""
QUALITY = 80


def predicted_latents(scheduler: Any, timestep: Tensor, model_input: Tensor, noise_pred: Tensor) -> Tensor:
    """Return the clean latents that the UNet's output predicts.

    With every scheduler, `scale_model_input` makes the UNet's input `sqrt(a) x + sqrt(1 - a) noise` with
    `a = alphas_cumprod[timestep]`.
    """
    alpha = scheduler.alphas_cumprod[timestep.round().long().clamp(0, len(scheduler.alphas_cumprod) - 1).cpu()]
    signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
    if scheduler.config.prediction_type == "sample":
        return noise_pred
    if scheduler.config.prediction_type == "v_prediction":
        return signal * model_input - noise * noise_pred
    return (model_input - noise * noise_pred) / signal


def previews(latents: Tensor, bundle: Bundle) -> list[bytes]:
    """Return a JPEG of each picture of `latents` [N, C, h, w], or of the first frame of each clip [N, C, F, h, w]."""
    if latents.ndim == 5:
        latents = latents[:, :, 0]
    factors, offset = torch.tensor(bundle.preview_factors), torch.tensor(bundle.preview_offset)
    rgb = torch.einsum("nchw,cd->nhwd", download(latents).float(), factors) + offset
    pixels = ((rgb + 1) * 127.5).nan_to_num().clamp(0, 255).to(torch.uint8).numpy()
    return [_jpeg(Image.fromarray(picture)) for picture in pixels]


def _jpeg(image: Image.Image) -> bytes:
    """Encode a picture, enlarged up to 8 times (a latent stands for 8 x 8 pixels) as far as `LONGEST_SIDE` allows."""
    scale = min(8.0, LONGEST_SIDE / max(image.size))
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()
