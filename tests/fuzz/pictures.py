"""Encoded pictures: every mode and format that Pillow writes, decompression bombs, fragments, and non-pictures."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Callable
from functools import lru_cache
from random import Random

import numpy as np
from PIL import Image

MODES = "1 L LA P RGB RGBA CMYK YCbCr LAB HSV I F I;16".split()


@lru_cache(maxsize=64)
def photo(size: int = 64, seed: int = 0) -> bytes:
    """Encode a harmless square PNG of colored blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return encode(Image.fromarray(blocks).resize((size, size), Image.Resampling.NEAREST), "PNG")


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


@lru_cache(maxsize=1)
def every_format() -> tuple[bytes, ...]:
    """Encode a small picture in every mode and format that Pillow can write on this machine."""
    Image.init()
    files = []
    for kind in sorted(Image.SAVE):
        for mode in MODES:
            try:
                files.append(encode(Image.new(mode, (16, 16)), kind))
            except (OSError, ValueError, KeyError, TypeError, RuntimeError, SystemError, AttributeError):
                continue  # plugins raise different errors for unsupported modes and missing libraries
    return tuple(files)


@lru_cache(maxsize=32)
def png(width: int, height: int, *, bits: int = 8, color: int = 0) -> bytes:
    """Build a complete black PNG of any size that compresses to few bytes (color 0: grayscale, 2: RGB)."""
    row = b"\0" * (1 + (width * bits * (3 if color == 2 else 1) + 7) // 8)
    packer = zlib.compressobj(9)
    pixels = b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()])
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    )


def png_header(width: int, height: int) -> bytes:
    """Build a PNG whose header claims this size, without the pixels for it."""
    whole = png(8, 8)
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]


@lru_cache(maxsize=4)
def animation(kind: str, frames: int = 5, size: int = 64) -> bytes:
    pictures = [Image.new("RGB", (size, size), (index % 256, 0, 0)) for index in range(frames)]
    return encode(pictures[0], kind, save_all=True, append_images=pictures[1:])


NOT_PICTURES = (
    b"",
    b"\0",
    b"\x89PNG\r\n\x1a\n",
    b"<svg xmlns='http://www.w3.org/2000/svg' width='99999' height='99999'/>",
    b"GIF89a\xff\xff\xff\xff\x80\0\0",
    b"P6 99999 99999 255\n",
    b"P5 1 0 255\n",
    b"P1\n-1 -1\n",
    b"BM" + b"\xff" * 60,
    b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 40,
    b"RIFF\xff\xff\xff\xffWEBPVP8 ",
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9999 9999\n",
    b"/etc/passwd",
    b"http://127.0.0.1:9/picture.png",
    b"data:image/png;base64,iVBORw0KGgo=",
    b"PK\x03\x04" + b"\0" * 40,
)

_BOMBS: tuple[Callable[[], bytes], ...] = (
    lambda: png(80_000, 1),
    lambda: png(1, 80_000),
    lambda: png(30_000, 2, color=2),
    lambda: png(2, 60_000, bits=1),
    lambda: png(8192, 8191, bits=1),
    lambda: png(16_000, 16_000, bits=1),
    lambda: png_header(30_000, 30_000),
    lambda: png_header(2**31 - 1, 1),
    lambda: png_header(1, 2**31 - 1),
    lambda: png_header(0, 8),
    lambda: png(0, 0),
    lambda: png(16, 16, bits=16),
    lambda: png(16, 16, bits=16, color=2),
    lambda: animation("GIF", 200, 16),
    lambda: animation("WEBP"),
    lambda: animation("PNG"),
    lambda: animation("TIFF"),
)


def corrupt(rng: Random, data: bytes) -> bytes:
    """Return `data` with bytes replaced, truncated, inserted or repeated."""
    if not data:
        return b"\0"
    changed, at = bytearray(data), rng.randrange(len(data))
    match rng.randrange(5):
        case 0 | 1:
            for _ in range(rng.randint(1, 12)):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
        case 2:
            del changed[at:]
        case 3:
            changed[at:at] = rng.randbytes(rng.randint(1, 50))
        case _:
            changed[at:at] = changed[at : at + rng.randint(1, 200)]
    return bytes(changed)


def picture(rng: Random) -> bytes:
    """Draw bytes for a picture input."""
    match rng.randrange(9):
        case 0 | 1:
            return photo(rng.choice((64, 64, 72, 8, 1, 300)), rng.randrange(4))
        case 2 | 3:
            return rng.choice(every_format())
        case 4:
            return rng.choice(_BOMBS)()
        case 5:
            return rng.choice(NOT_PICTURES)
        case 6:
            return rng.choice((b"", b"data:image/png;base64,")) + base64.b64encode(picture(rng))
        case _:
            return corrupt(rng, rng.choice((photo(), *every_format())))


def pictures(rng: Random) -> list[bytes]:
    """Draw a list for a picture input; now and then far too many, or only bombs."""
    match rng.randrange(12):
        case 0:
            return [photo(16)] * rng.choice((65, 257, 1000))
        case 1:
            return [rng.choice(_BOMBS)()] * rng.randint(2, 8)
        case 2:
            return []
        case _:
            return [picture(rng) for _ in range(rng.choice((1, 1, 1, 2, 3, 8)))]
