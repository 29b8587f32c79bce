"""Pictures in and out, computed as transformers' and diffusers' processors compute them, without torch."""

from __future__ import annotations

import io
import math
import warnings

import numpy as np
from PIL import Image, ImageOps

from imprompt_serving.errors import InvalidRequest
from imprompt_serving.specs import ImageEncoder

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64 * 1024 * 1024
"""Largest picture that is decoded; a header is enough to refuse a larger one."""


def decode(data: bytes, parameter: str) -> Image.Image:
    """An encoded picture, upright as its EXIF orientation says.

    Raises:
        InvalidRequest: not a PNG, JPEG or WebP picture, damaged, or larger than ``MAX_PIXELS``.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise InvalidRequest(
                parameter, f"{image.width}x{image.height} is too large; at most {MAX_PIXELS // 1024**2} megapixels"
            )
        image.load()
        return ImageOps.exif_transpose(image)
    except InvalidRequest:
        raise
    except Image.DecompressionBombError:
        raise InvalidRequest(parameter, f"too large; at most {MAX_PIXELS // 1024**2} megapixels") from None
    except Exception as error:
        raise InvalidRequest(parameter, f"not a readable {', '.join(FORMATS)} picture: {error}") from None


def rgb(image: Image.Image) -> Image.Image:
    """``image`` without transparency, over white, as transformers' ``convert_to_rgb`` does."""
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def clip_pixels(image: Image.Image, encoder: ImageEncoder) -> np.ndarray:
    """Input of a CLIP vision encoder [3, S, S]: transformers' ``CLIPImageProcessor`` (Pillow backend)."""
    image = rgb(image)
    if encoder.resize is not None:
        image = image.resize(encoder.resize[::-1], Image.Resampling(encoder.resample))
    elif encoder.shortest_edge is not None:
        short, long = sorted(image.size)
        edges = encoder.shortest_edge, int(encoder.shortest_edge * long / short)
        image = image.resize(edges if image.width <= image.height else edges[::-1], Image.Resampling(encoder.resample))
    pixels = np.asarray(image)
    if encoder.crop is not None:
        pixels = _center_crop(pixels, *encoder.crop)
    scaled = (pixels.astype(np.float64) * encoder.rescale_factor).astype(np.float32)
    normalized = (scaled - np.array(encoder.mean, np.float32)) / np.array(encoder.std, np.float32)
    return np.ascontiguousarray(normalized.transpose(2, 0, 1))


def _center_crop(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Crop from the middle; pictures that are too small get a black border."""
    missing = [max(want - have, 0) for want, have in zip((height, width), pixels.shape[:2], strict=True)]
    border = [(math.ceil(m / 2), m - math.ceil(m / 2)) for m in missing]
    pixels = np.pad(pixels, (*border, (0, 0)))
    top, left = ((have - want) // 2 for want, have in zip((height, width), pixels.shape[:2], strict=True))
    return pixels[top : top + height, left : left + width]


def vae_pixels(images: list[Image.Image], height: int, width: int) -> np.ndarray:
    """Input of the VAE encoder [N, 3, height, width] in -1..1 (diffusers' ``VaeImageProcessor.preprocess``)."""
    resized = [image.resize((width, height), Image.Resampling.LANCZOS).convert("RGB") for image in images]
    return 2.0 * _planes(resized) - 1.0


def control_pixels(images: list[Image.Image], height: int, width: int, mode: str = "RGB") -> np.ndarray:
    """Control images [N, C, height, width] in 0..1 (``control_image_processor`` of diffusers' ControlNet pipelines)."""
    return _planes([image.resize((width, height), Image.Resampling.LANCZOS).convert(mode) for image in images])


def mask_pixels(masks: list[Image.Image], height: int, width: int) -> np.ndarray:
    """Masks [N, 1, height, width] of 0 and 1 (``VaeImageProcessor`` and ``IPAdapterMaskProcessor``, which agree)."""
    resized = [mask.resize((width, height), Image.Resampling.LANCZOS).convert("L") for mask in masks]
    return (_planes(resized) >= 0.5).astype(np.float32)


def _planes(images: list[Image.Image]) -> np.ndarray:
    """Pictures of one size as float planes [N, C, H, W] in 0..1."""
    pixels = np.stack([np.asarray(image) for image in images]).astype(np.float32) / 255.0
    return pixels[:, None] if pixels.ndim == 3 else np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
