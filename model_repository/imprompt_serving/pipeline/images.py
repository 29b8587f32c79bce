"""Decode and preprocess pictures as the processors of transformers and diffusers do, without torch."""

from __future__ import annotations

import base64
import io
import math
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, features

from imprompt_serving.errors import InvalidRequest
from imprompt_serving.specs import ImageEncoder, Limits

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", *(("AVIF",) if features.check("avif") else ()))
"""Pillow's names of the formats that callers may send. Pillow reads AVIF from version 11.3 on."""
_READABLE = "not a readable {}, {} or {} picture".format(", ".join(FORMATS[:-2]), *FORMATS[-2:]).replace("WEBP", "WebP")
MEGAPIXEL = 1024 * 1024
_MAX_SCANS = 100
"""Largest number of scans in a progressive JPEG. Encoders write about ten, and each costs as much as a picture."""
_MAX_PROFILES = 4
"""Largest number of color profiles in a PNG. The format allows one."""
_MAX_GIF_BLOCKS = 10_000
"""Largest number of blocks before the first frame of a GIF. Pillow reads them one by one: a comment or profile of 1 MB
has about 4,000."""
_PARTIAL_RESIZE_RATIO = 4
"""If the resized picture has more than this many times the pixels of the part to keep, resize only that part."""

# Pillow unpacks the text chunks of a PNG while it reads the header: up to 64 MB by default.
PngImagePlugin.MAX_TEXT_MEMORY = 4 * MEGAPIXEL


def file_bytes(data: bytes, parameter: str, index: int = 0, count: int = 1) -> bytes:
    """Return the bytes of a picture file that a caller sent as such, as base64 text, or as a base64 data URI.

    Raises:
        InvalidRequest: the value is a URL or a damaged data URI. Other text is left to `decode` to refuse.
    """
    which = _which(index, count)
    if data[:5].lower() == b"data:":
        header, comma, text = data.partition(b",")
        if not comma or not header.lower().endswith(b";base64"):
            raise InvalidRequest(parameter, f"{which}a data URI must start like `data:image/png;base64,`")
        return _from_base64(text, parameter, which)
    if data[:8].lower().startswith((b"http://", b"https://")):
        raise InvalidRequest(parameter, f"{which}a URL, which the server does not fetch; send the file")
    # The first bytes of every format contain characters that base64 does not use.
    if data and not data[:16].strip(_BASE64):
        return _from_base64(data, parameter, which)
    return data


_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=\r\n"


def _from_base64(text: bytes, parameter: str, which: str) -> bytes:
    try:
        return base64.b64decode(text.translate(None, b"\r\n"), validate=True)
    except ValueError as error:
        raise InvalidRequest(parameter, f"{which}not valid base64: {error}") from None


def check_count(counts: Mapping[str, int], limits: Limits) -> None:
    """Check the number of pictures in a request, by parameter.

    Raises:
        InvalidRequest: there are too many.
    """
    total = 0
    for parameter, count in counts.items():
        total += count
        if total > limits.images:
            raise InvalidRequest(parameter, f"a request takes at most {limits.images} pictures in total")


def check_headers(pictures: Mapping[str, Sequence[bytes]], limits: Limits) -> None:
    """Check the encoded pictures of a request, by parameter, before any of them is decoded.

    Raises:
        InvalidRequest: a picture is not in one of the `FORMATS` or is too elongated, or there are too many pixels in
            total.
    """
    pixels = 0
    for parameter, files in pictures.items():
        for index, data in enumerate(files):
            which = _which(index, len(files))
            with _open(data, parameter, which) as image:
                width, height = image.size
            if max(width, height) > limits.image_aspect_ratio * min(width, height):
                ratio = f"the longer side may be at most {limits.image_aspect_ratio:g} times the shorter one"
                raise InvalidRequest(parameter, f"{which}{width}x{height} is too elongated; {ratio}")
            pixels += width * height
            if pixels > limits.image_megapixels * MEGAPIXEL:
                limit = f"a request takes at most {limits.image_megapixels:g} megapixels in total"
                raise InvalidRequest(parameter, f"{which}{width}x{height} is too large; {limit}")


def decode(data: bytes, parameter: str, index: int = 0, count: int = 1) -> Image.Image:
    """Decode picture `index` of `count` of a parameter, rotated by its EXIF orientation, with 8 bits per channel.

    Raises:
        InvalidRequest: the picture is damaged, or not in one of the `FORMATS`.
    """
    which = _which(index, count)
    with _open(data, parameter, which) as image:
        try:
            image.load()
            upright = ImageOps.exif_transpose(image)
        except Exception as error:  # whatever Pillow's decoders raise for a damaged file
            raise _damaged(parameter, which, error) from None
    if upright.mode.startswith("I"):
        return _eight_bits(upright)
    # Drop text and profiles, which can be larger than the pixels.
    upright.info = {name: value for name, value in upright.info.items() if name == "transparency"}
    return upright


def decode_all(files: Sequence[bytes], parameter: str) -> tuple[Image.Image, ...]:
    """Decode all pictures of a parameter; raises like `decode`."""
    return tuple(decode(data, parameter, index, len(files)) for index, data in enumerate(files))


def _open(data: bytes, parameter: str, which: str) -> Image.Image:
    """Open a picture and read only its header."""
    # In the data of a JPEG, this marker can only start a scan.
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > _MAX_SCANS:
        raise InvalidRequest(parameter, f"{which}a JPEG picture with more than {_MAX_SCANS} scans")
    # Pillow unpacks up to 1 MB for each profile.
    if data.startswith(b"\x89PNG") and data.count(b"iCCP") > _MAX_PROFILES:
        raise InvalidRequest(parameter, f"{which}a PNG picture with more than {_MAX_PROFILES} color profiles")
    if data.startswith(b"GIF8") and not _has_few_gif_blocks(data):
        raise InvalidRequest(parameter, f"{which}a GIF picture with more than {_MAX_GIF_BLOCKS} blocks before a frame")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise InvalidRequest(parameter, f"{which}too large") from None
    except Image.UnidentifiedImageError:
        raise InvalidRequest(parameter, f"{which}{_READABLE}") from None
    except Exception as error:
        raise _damaged(parameter, which, error) from None
    # Pillow decodes these in Python, which takes seconds and blocks all other threads.
    if any(tile[0] == "bmp_rle" for tile in image.tile):
        raise InvalidRequest(parameter, f"{which}a compressed BMP picture; save it without compression or as PNG")
    return image


def _has_few_gif_blocks(data: bytes) -> bool:
    """Return whether the first frame of a GIF, or its end, comes within `_MAX_GIF_BLOCKS` blocks."""
    position = 13  # the header, and a palette if there is one
    if len(data) > 10 and data[10] & 0x80:
        position += 3 << (data[10] & 7) + 1
    inside = False
    for _ in range(_MAX_GIF_BLOCKS):
        if position >= len(data):
            return True
        if inside:
            inside, position = data[position] > 0, position + data[position] + 1
        elif data[position] in b",;":
            return True
        else:  # an extension, or garbage that Pillow skips byte by byte
            inside = data[position] == ord("!")
            position += 2 if inside else 1
    return False


def _damaged(parameter: str, which: str, error: Exception) -> InvalidRequest:
    return InvalidRequest(parameter, f"{which}{_READABLE}: {error}")


def _which(index: int, count: int) -> str:
    return f"picture {index + 1} of {count}: " if count > 1 else ""


def _eight_bits(image: Image.Image) -> Image.Image:
    """Convert a 16-bit grayscale picture (Pillow's modes `I;16` and `I`) to 8 bits; transparency becomes alpha."""
    values = np.asarray(image).astype(np.int64)
    gray = Image.fromarray((values.clip(0, 65535) / 257.0).round().astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        gray.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return gray


def rgb(image: Image.Image) -> Image.Image:
    """Replace transparency by white, as transformers' `convert_to_rgb` does."""
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def clip_pixels(image: Image.Image, encoder: ImageEncoder) -> np.ndarray:
    """Make the input of a CLIP vision encoder [3, S, S], like transformers' `CLIPImageProcessor` (Pillow backend)."""
    image, size = rgb(image), image.size
    if encoder.resize is not None:
        size = encoder.resize[1], encoder.resize[0]
    elif encoder.shortest_edge is not None:
        short, long = sorted(image.size)
        edges = encoder.shortest_edge, int(encoder.shortest_edge * long / short)
        size = edges if image.width <= image.height else (edges[1], edges[0])
    resample = Image.Resampling(encoder.resample)
    if encoder.crop is None:
        pixels = np.asarray(image.resize(size, resample))
    else:
        crop_height, crop_width = encoder.crop
        left, top = (max((have - want) // 2, 0) for have, want in zip(size, (crop_width, crop_height), strict=True))
        box = (left, top, min(left + crop_width, size[0]), min(top + crop_height, size[1]))
        pixels = _padded(np.asarray(resized_part(image, size, box, resample)), crop_height, crop_width)
    scaled = (pixels.astype(np.float64) * encoder.rescale_factor).astype(np.float32)
    normalized = (scaled - np.array(encoder.mean, np.float32)) / np.array(encoder.std, np.float32)
    return np.ascontiguousarray(normalized.transpose(2, 0, 1))


def resized_part(
    image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int], resample: Image.Resampling
) -> Image.Image:
    """Resize `image` to `size`, and return the part `box` (left, top, right, bottom).

    For elongated pictures, only that part is resized, so that memory is bounded by the picture and the part.
    """
    left, top, right, bottom = box
    if size[0] * size[1] <= _PARTIAL_RESIZE_RATIO * (right - left) * (bottom - top):
        return image.resize(size, resample).crop(box)
    x, y = image.width / size[0], image.height / size[1]
    source = (left * x, top * y, min(right * x, image.width), min(bottom * y, image.height))
    return image.resize((right - left, bottom - top), resample, box=source)


def _padded(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Add a black border to pictures that are smaller than the crop."""
    missing = [want - have for want, have in zip((height, width), pixels.shape[:2], strict=True)]
    return np.pad(pixels, (*((math.ceil(m / 2), m - math.ceil(m / 2)) for m in missing), (0, 0)))


def vae_pixels(images: list[Image.Image], height: int, width: int) -> np.ndarray:
    """Make the input of the VAE encoder [N, 3, height, width] in -1..1 (diffusers' `VaeImageProcessor.preprocess`)."""
    resized = [image.resize((width, height), Image.Resampling.LANCZOS).convert("RGB") for image in images]
    return 2.0 * _planes(resized) - 1.0


def control_pixels(images: list[Image.Image], height: int, width: int, mode: str = "RGB") -> np.ndarray:
    """Make control images [N, C, height, width] in 0..1 (`control_image_processor` in diffusers' pipelines)."""
    return _planes([image.resize((width, height), Image.Resampling.LANCZOS).convert(mode) for image in images])


def mask_pixels(masks: list[Image.Image], height: int, width: int) -> np.ndarray:
    """Make masks [N, 1, height, width] of 0 and 1, as both `VaeImageProcessor` and `IPAdapterMaskProcessor` do."""
    resized = [mask.resize((width, height), Image.Resampling.LANCZOS).convert("L") for mask in masks]
    return (_planes(resized) >= 0.5).astype(np.float32)


def _planes(images: list[Image.Image]) -> np.ndarray:
    """Stack pictures of one size as float planes [N, C, H, W] in 0..1."""
    pixels = np.stack([np.asarray(image) for image in images]).astype(np.float32) / 255.0
    return pixels[:, None] if pixels.ndim == 3 else np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
