"""Decode pictures in a request: base64, data URIs, and OpenAI's masks."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageChops

from imprompt_gateway.errors import refuse

MAX_MASK_PIXELS = 2**24
"""4096 x 4096: larger than the pictures that a bundle makes, and 64 MiB when decoded."""
_MASK_FORMATS = ("PNG", "WEBP", "GIF")
"""Formats with transparency."""


def decode_pictures(name: str, value: object) -> Any:
    """Decode the pictures of a parameter, nested in lists and objects as the SDK takes them."""
    match value:
        case str():
            return _decode(name, value)
        case list():
            return [decode_pictures(name, item) for item in value]
        case Mapping():
            return {key: decode_pictures(name, item) for key, item in value.items()}
        case bytes() | None:
            return value
    raise refuse(name, f"must be a picture in base64 or as a data URI, not {type(value).__name__}")


def _decode(name: str, text: str) -> bytes:
    if text.startswith(("http://", "https://")):
        raise refuse(name, "URLs are not fetched; send the picture itself, in base64 or as a data URI")
    if text.startswith("data:"):
        header, _, text = text.partition(",")
        if not header.endswith(";base64"):
            raise refuse(name, "a data URI must contain base64, as in data:image/png;base64,...")
    try:
        return base64.b64decode("".join(text.split()), validate=True)  # many tools wrap the lines of base64
    except (binascii.Error, ValueError) as error:
        raise refuse(name, f"is not valid base64 ({error})") from None


def white_where_transparent(name: str, mask: object) -> bytes:
    """Convert OpenAI's mask, of which the transparent pixels are repainted, to a grayscale one with white pixels."""
    if not isinstance(mask, bytes):
        raise refuse(name, "must be a single picture")
    try:
        image = Image.open(io.BytesIO(mask), formats=_MASK_FORMATS)
        if fits := image.width * image.height <= MAX_MASK_PIXELS:
            alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    except Exception:  # Pillow raises exceptions of many kinds for damaged files
        raise refuse(name, f"must be a picture in one of the formats {', '.join(_MASK_FORMATS)}") from None
    if not fits:
        raise refuse(name, f"must have at most {MAX_MASK_PIXELS} pixels, got {image.width}x{image.height}")
    if alpha is None:
        raise refuse(name, "has no transparent pixels to repaint; send a black and white mask as mask_image")
    file = io.BytesIO()
    ImageChops.invert(alpha).save(file, "PNG")
    return file.getvalue()
