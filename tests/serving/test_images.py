"""Pictures sent by callers: what is read and refused, and that their pixels bound the memory."""

from __future__ import annotations

import base64
import io
import resource
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from imprompt_serving.errors import InvalidRequest
from imprompt_serving.pipeline.images import (
    check_count,
    check_headers,
    clip_pixels,
    decode,
    decode_all,
    file_bytes,
    rgb,
)
from imprompt_serving.pipeline.mask_crop import Box, fit_filled, overlay
from imprompt_serving.specs import ImageEncoder, Limits
from tiny import images

ENCODER = ImageEncoder(
    name="clip",
    shortest_edge=224,
    resize=None,
    crop=(224, 224),
    resample=3,
    rescale_factor=1 / 255,
    mean=(0.48, 0.46, 0.41),
    std=(0.27, 0.26, 0.28),
    image_size=224,
)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """Make a PNG whose header claims this size, with `chunks` before its few pixels."""
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            *chunks,
            chunk(b"IDAT", zlib.compress(b"\0")),
            chunk(b"IEND", b""),
        ]
    )


def rle_bmp() -> bytes:
    """Make a run-length encoded BMP, by changing the header of an uncompressed one."""
    data = bytearray(encoded(Image.new("P", (64, 64)), "BMP"))
    data[30] = 1
    return bytes(data)


GIF = encoded(Image.new("L", (4, 4)), "GIF")
assert GIF[10] & 0x80, "has a palette"


def gif_with_blocks(extension: bytes, blocks: int) -> bytes:
    """Make a GIF with an extension of so many blocks of one byte before its frame."""
    start = GIF.index(b",", 13 + (3 << (GIF[10] & 7) + 1))
    return GIF[:start] + extension + b"\1x" * blocks + b"\0" + GIF[start:]


GOOD = encoded(images.photo(1))
READABLE = "not a readable PNG, JPEG, WebP, GIF, BMP or AVIF picture"
DAMAGED = f"{READABLE}: "


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", READABLE),
        (b"this is text", READABLE),
        (encoded(images.photo(1), "PPM"), READABLE),
        (encoded(images.photo(1), "TIFF"), READABLE),
        (GOOD[:200], DAMAGED),
        (encoded(images.photo(1), "JPEG")[:400], DAMAGED),
        (GOOD.replace(b"IDAT", b"IDAT" + b"\0" * 40, 1), DAMAGED),
        (png(0, 5), READABLE),
        (png(5, 5, chunk(b"tEXt", b"a\0b"), *[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**6)))] * 9), DAMAGED),
        (encoded(images.photo(1), "JPEG") + b"\xff\xda" * 200, "a JPEG picture with more than 100 scans"),
        (png(5, 5, *[chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**6)))] * 5), "more than 4 color profiles"),
        (encoded(images.photo(1), "GIF")[:-500], DAMAGED),
        (encoded(images.photo(1), "GIF")[:300], READABLE),
        (encoded(images.photo(1).convert("RGB"), "AVIF")[:300], READABLE),
        (encoded(images.photo(1).convert("RGB"), "BMP")[:300], DAMAGED),
        (rle_bmp(), "a compressed BMP picture; save it without compression or as PNG"),
        (gif_with_blocks(b"!\xfe", 20_000), "a GIF picture with more than 10000 blocks before a frame"),
        (gif_with_blocks(b"!\xff", 20_000), "a GIF picture with more than 10000 blocks before a frame"),
        (GIF[:13] + bytes(20_000) + GIF[13:], "a GIF picture with more than 10000 blocks before a frame"),
    ],
    ids=range(19),
)
def test_unreadable_pictures_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode_all([GOOD, data], "image")
    assert str(caught.value).startswith("image: picture 2 of 2: ")
    assert message in str(caught.value)
    assert "0x" not in str(caught.value)
    with pytest.raises(InvalidRequest) as caught:
        decode(data, "mask_image")
    assert str(caught.value).startswith("mask_image: ")
    assert "picture 1" not in str(caught.value)


def test_headers_bound_the_pictures_of_a_request() -> None:
    limits = Limits(image_megapixels=1.0, image_aspect_ratio=4.0)
    check_headers({"image": [png(1024, 512)], "mask_image": [png(512, 1024)]}, limits)
    for given, message in (
        ({"image": [png(1024, 512)], "mask_image": [png(512, 1025)]}, "mask_image: 512x1025 is too large; a request"),
        ({"image": [png(1024, 255)]}, "image: 1024x255 is too elongated"),
        ({"image": [png(30_000, 30_000)]}, "image: too large"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            check_headers(given, limits)
        assert str(caught.value).startswith(message)


def test_supported_formats_and_modes_are_decoded() -> None:
    photo = images.photo(1).convert("RGB")
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "AVIF"):
        assert np.abs(np.asarray(decode(encoded(photo, kind), "image"), int) - np.asarray(photo)).mean() < 8
    moving = encoded(photo, "WEBP", save_all=True, append_images=[images.photo(2).convert("RGB")])
    assert decode(moving, "image").size == photo.size  # the first frame
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    for kind in ("GIF", "AVIF"):
        first = rgb(decode(encoded(red, kind, save_all=True, append_images=[blue]), "image"))
        assert np.abs(np.array(first.getpixel((4, 4))) - (255, 0, 0)).max() < 10
    assert decode(gif_with_blocks(b"!\xfe", 5_000), "image").size == (4, 4)
    clear = encoded(Image.new("P", (4, 4), 3), "GIF", transparency=3)
    assert rgb(decode(clear, "image")).getpixel((0, 0)) == (255, 255, 255)
    turned = Image.Exif()
    turned[0x0112] = 6
    assert decode(encoded(photo.crop((0, 0, 40, 20)), "JPEG", exif=turned), "image").size == (20, 40)


def test_number_of_pictures_is_bounded() -> None:
    check_count({"image": 2, "mask_image": 1}, Limits(images=3))
    with pytest.raises(InvalidRequest, match="mask_image: a request takes at most 3 pictures in total"):
        check_count({"image": 2, "mask_image": 2, "video": 9}, Limits(images=3))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF"])
def test_text_stands_for_the_bytes_of_a_picture(kind: str) -> None:
    data = encoded(images.photo(1).convert("RGB"), kind)
    text = base64.b64encode(data)
    for given in (data, text, base64.encodebytes(data), b"data:image/x;base64," + text, b"DATA:;BASE64," + text):
        assert file_bytes(given, "image") == data


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"iVBORw0", "not valid base64"),
        (b"iVBORw0KGgo====", "not valid base64"),
        (base64.b64encode(GOOD)[:-3] + b"_-=", "not valid base64"),
        (b"data:image/png;base64,####", "not valid base64"),
        (b"data:image/png,abc", "a data URI must start like `data:image/png;base64,`"),
        (b"data:image/png;base64", "a data URI must start like `data:image/png;base64,`"),
        (b"https://example.com/a.png", "a URL, which the server does not fetch"),
        (b"HTTP://169.254.169.254/", "a URL, which the server does not fetch"),
    ],
)
def test_text_that_stands_for_no_picture_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        file_bytes(text, "image", 1, 3)
    assert str(caught.value).startswith(f"image: picture 2 of 3: {message}")


@pytest.mark.parametrize("text", [b"", b"data:image/png;base64,", b"file:///etc/passwd", base64.b64encode(b"hello!")])
def test_other_text_is_not_a_picture(text: bytes) -> None:
    with pytest.raises(InvalidRequest, match=READABLE):
        decode(file_bytes(text, "image"), "image")


def test_text_counts_as_the_picture_that_it_stands_for() -> None:
    limits = Limits(image_megapixels=1.0)
    check_headers({"image": [file_bytes(base64.b64encode(png(1024, 1024)), "image")]}, limits)
    for kind in ("GIF", "BMP", "AVIF"):
        large = encoded(Image.new("L", (1024, 1025)).convert("RGB"), kind)
        with pytest.raises(InvalidRequest, match="image: 1024x1025 is too large"):
            check_headers({"image": [file_bytes(base64.b64encode(large), "image")]}, limits)


@pytest.mark.parametrize("large", [65535, 300])
def test_16_bit_grayscale_is_scaled_to_8_bits(large: int) -> None:
    ramp = np.linspace(0, large, 64 * 64).reshape(64, 64).astype(np.uint16)
    image = decode(encoded(Image.fromarray(ramp)), "control_image")
    assert image.mode == "L"
    assert np.array_equal(np.asarray(image), np.round(ramp / 257.0))


def test_transparent_16_bit_grayscale_gets_an_alpha_channel() -> None:
    ramp = np.arange(16, dtype=np.uint16).reshape(4, 4)
    image = decode(encoded(Image.fromarray(ramp), transparency=7), "image")
    assert np.array_equal(np.asarray(image)[..., 1] == 0, ramp == 7)


def test_text_in_a_picture_is_dropped() -> None:
    note = PngImagePlugin.PngInfo()
    note.add_text("note", "x" * 10_000)
    palette = images.photo(1).convert("P")
    image = decode(encoded(palette, pnginfo=note, transparency=3), "image")
    assert set(image.info) == {"transparency"}


@pytest.mark.parametrize("size", [(80_000, 1), (1, 80_000), (60_000, 8)])
def test_elongated_pictures_use_little_memory(size: tuple[int, int]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert clip_pixels(Image.new("RGB", size, (255, 0, 0)), ENCODER).shape == (3, 224, 224)
    original, mask = Image.new("RGB", size), Image.new("L", size, 255)
    overlay(mask, original, Image.new("RGB", (512, 512)), Box(0, 0, *size))
    fit_filled(original, 512, 512)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


@pytest.mark.parametrize("size", [(2000, 250), (250, 2000), (1999, 333), (333, 1999)])
def test_elongated_pictures_are_cropped_like_transformers(size: tuple[int, int]) -> None:
    photo = images.photo(1, size=size).convert("RGB")
    short, long = sorted(size)
    edges = 224, int(224 * long / short)
    resized = photo.resize(edges if size[0] <= size[1] else edges[::-1], Image.Resampling(ENCODER.resample))
    left, top = (resized.width - 224) // 2, (resized.height - 224) // 2
    expected = np.asarray(resized.crop((left, top, left + 224, top + 224))) / 255
    values = clip_pixels(photo, ENCODER).transpose(1, 2, 0) * np.array(ENCODER.std) + np.array(ENCODER.mean)
    assert np.abs(values - expected).max() < 1.5 / 255
    assert np.asarray(resized).std() > 10
