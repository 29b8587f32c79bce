"""Deterministic test data: photo-like pictures, masks, control images, and face embeddings."""

import colorsys

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter


def photo(seed: int = 0, size: tuple[int, int] = (96, 96)) -> Image.Image:
    """Draw a sky gradient, a few soft shapes and film grain; `size` is (width, height), as in PIL."""
    rng = np.random.default_rng(seed)
    width, height = size
    top, bottom = (np.array(_color(rng, value=value)) for value in (1.0, 0.35))
    ramp = np.linspace(0, 1, height)[:, None, None] * np.ones((1, width, 1))
    picture = Image.fromarray((top * (1 - ramp) + bottom * ramp).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for index in range(6):
        x, y = rng.integers(0, width), rng.integers(0, height)
        rx, ry = rng.integers(width // 12 + 1, width // 3 + 2), rng.integers(height // 12 + 1, height // 3 + 2)
        shape = draw.ellipse if index % 2 else draw.rectangle
        shape((x - rx, y - ry, x + rx, y + ry), fill=_color(rng, value=float(rng.uniform(0.3, 1))))
    pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(1)), dtype=np.float32)
    return Image.fromarray(np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).round().astype(np.uint8))


def photos(count: int, seed: int = 0, size: tuple[int, int] = (96, 96)) -> list[Image.Image]:
    return [photo(seed * 1000 + index, size) for index in range(count)]


def mask(kind: str = "left", size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Draw a mask, white (255) where it applies: `left`, `right`, `top`, `bottom` half, `circle`, or a `soft` ramp."""
    width, height = size
    if kind == "soft":
        return Image.fromarray(np.tile(np.linspace(0, 255, width).round().astype(np.uint8), (height, 1)))
    picture = Image.new("L", size)
    draw = ImageDraw.Draw(picture)
    halves = {
        "left": (0, 0, width // 2 - 1, height),
        "right": (width // 2, 0, width, height),
        "top": (0, 0, width, height // 2 - 1),
        "bottom": (0, height // 2, width, height),
    }
    if kind == "circle":
        draw.ellipse((width * 0.2, height * 0.2, width * 0.8, height * 0.8), fill=255)
    else:
        draw.rectangle(halves[kind], fill=255)
    return picture


def control_image(kind: str = "canny", seed: int = 0, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Draw an RGB control image as annotators do: `canny` (white lines on black) or `depth` (a soft gray relief)."""
    if kind == "depth":
        return photo(seed, size).convert("L").filter(ImageFilter.GaussianBlur(3)).convert("RGB")
    rng = np.random.default_rng(seed)
    picture = Image.new("RGB", size)
    draw = ImageDraw.Draw(picture)
    for _ in range(5):
        x0, x1 = sorted(rng.integers(0, size[0], 2).tolist())
        y0, y1 = sorted(rng.integers(0, size[1], 2).tolist())
        draw.ellipse((x0, y0, x1 + 8, y1 + 8), outline="white")
        draw.line((x0, y1, x1, y0), fill="white")
    return picture


def pixels(picture: Image.Image) -> torch.Tensor:
    """Convert a picture to [3, H, W] in 0..1, as expected by ControlNets."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)


def video(frames: int = 8, seed: int = 0, size: tuple[int, int] = (64, 64)) -> list[Image.Image]:
    """Pan over one photo from left to right."""
    width, height = size
    wide = photo(seed, (width + 4 * frames, height))
    return [wide.crop((4 * index, 0, 4 * index + width, height)) for index in range(frames)]


def face_embeds(faces: int = 1, seed: int = 0, *, guidance: bool = True) -> torch.Tensor:
    """Draw `ip_adapter_image_embeds` for FaceID: [2, faces, 512] (zeros first), or [1, faces, 512] without guidance.

    Like insightface's `normed_embedding`, rows have unit length.
    """
    embeds = torch.randn(1, faces, 512, generator=torch.Generator().manual_seed(seed))
    embeds = embeds / embeds.norm(dim=-1, keepdim=True)
    return torch.cat([torch.zeros_like(embeds), embeds]) if guidance else embeds


def _color(rng: np.random.Generator, *, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(float(rng.uniform()), float(rng.uniform(0.4, 1)), value)
    return round(red * 255), round(green * 255), round(blue * 255)
