"""Crop to the mask for inpainting (`padding_mask_crop`), as diffusers' `VaeImageProcessor` does."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from imprompt_serving.pipeline.images import resized_part

_LANCZOS = Image.Resampling.LANCZOS


class Box(NamedTuple):
    """A part of a picture in pixels; `right` and `bottom` are exclusive."""

    left: int
    top: int
    right: int
    bottom: int


def crop_region(mask: Image.Image, width: int, height: int, margin: int) -> Box:
    """Return the masked region, widened by `margin`, then to the aspect ratio of the result (`get_crop_region`)."""
    painted = np.asarray(mask.convert("L")) != 0
    columns, rows = np.flatnonzero(painted.any(axis=0)), np.flatnonzero(painted.any(axis=1))
    left, right = (columns[0], columns[-1] + 1) if len(columns) else (mask.width, 0)
    top, bottom = (rows[0], rows[-1] + 1) if len(rows) else (mask.height, 0)
    x1, y1 = max(int(left) - margin, 0), max(int(top) - margin, 0)
    x2, y2 = min(int(right) + margin, mask.width), min(int(bottom) + margin, mask.height)
    ratio = width / height
    if (x2 - x1) / (y2 - y1) > ratio:
        y1, y2 = _widen(y1, y2, int((x2 - x1) / ratio - (y2 - y1)), mask.height)
    else:
        x1, x2 = _widen(x1, x2, int((y2 - y1) * ratio - (x2 - x1)), mask.width)
    return Box(x1, y1, x2, y2)


def _widen(low: int, high: int, by: int, limit: int) -> tuple[int, int]:
    """Widen an interval on both sides; shift it to stay within 0..`limit`, or clamp it if it is too long."""
    low, high = low - by // 2, high + by - by // 2
    if high >= limit:
        low, high = low - (high - limit), limit
    if low < 0:
        low, high = 0, high - low
    return low, min(high, limit)


def fit_filled(image: Image.Image, width: int, height: int) -> Image.Image:
    """Fit the whole picture into `width` x `height`, and fill the rest with its edges (`resize_mode="fill"`)."""
    ratio, image_ratio = width / height, image.width / image.height
    w = width if ratio < image_ratio else max(image.width * height // image.height, 1)
    h = height if ratio >= image_ratio else max(image.height * width // image.width, 1)
    resized = image.resize((w, h), _LANCZOS)
    result = Image.new("RGB", (width, height))
    result.paste(resized, box=(width // 2 - w // 2, height // 2 - h // 2))
    if ratio < image_ratio and (fill := height // 2 - h // 2) > 0:
        result.paste(resized.resize((width, fill), box=(0, 0, width, 0)), box=(0, 0))
        result.paste(resized.resize((width, fill), box=(0, h, width, h)), box=(0, fill + h))
    elif ratio > image_ratio and (fill := width // 2 - w // 2) > 0:
        result.paste(resized.resize((fill, height), box=(0, 0, 0, height)), box=(0, 0))
        result.paste(resized.resize((fill, height), box=(w, 0, w, height)), box=(fill + w, 0))
    return result


def overlay(mask: Image.Image, original: Image.Image, result: Image.Image, box: Box) -> Image.Image:
    """Paste an inpainted crop back; outside the mask, the original stays (`apply_overlay`)."""
    kept = Image.new("RGBa", original.size)
    kept.paste(original.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask.convert("L")))
    base = Image.new("RGBA", original.size)
    base.paste(_fit_cropped(result, box.right - box.left, box.bottom - box.top), (box.left, box.top))
    whole = base.convert("RGB").convert("RGBA")
    whole.alpha_composite(kept.convert("RGBA"))
    return whole.convert("RGB")


def _fit_cropped(image: Image.Image, width: int, height: int) -> Image.Image:
    """Cover `width` x `height` with the picture, and cut off the rest (`resize_mode="crop"`)."""
    ratio, image_ratio = width / height, image.width / image.height
    w = width if ratio > image_ratio else image.width * height // image.height
    h = height if ratio <= image_ratio else image.height * width // image.width
    # The part of the picture inside the result, and its position there.
    x, y = width // 2 - w // 2, height // 2 - h // 2
    part = (max(-x, 0), max(-y, 0), min(width - x, w), min(height - y, h))
    result = Image.new("RGB", (width, height))
    result.paste(resized_part(image, (w, h), part, _LANCZOS), box=(max(x, 0), max(y, 0)))
    return result
