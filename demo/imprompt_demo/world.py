"""The picture world: bold, flat 64 x 64 pictures, each defined by a *layout* and a *look*.

The layout is what to draw and where: a thing and small shifts. The look is how to paint it: four colors, and the
textures of the thing and the background. A short caption names only the thing, so the look has to come from an image
prompt. A full description names both.

Rendering is deterministic: the same `random.Random` state produces the same picture.
"""

import math
import random
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from .things import THINGS, Polygon

SIZE = 64
"""Side length of a picture in pixels."""

_OVERSAMPLING = 4

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 48, 45),
    "orange": (246, 140, 30),
    "yellow": (252, 218, 60),
    "green": (60, 168, 72),
    "teal": (32, 180, 178),
    "blue": (45, 92, 215),
    "purple": (128, 66, 188),
    "pink": (246, 135, 185),
    "white": (246, 246, 242),
    "black": (32, 32, 38),
}

ANGLES = (0, 45, 90)
BODY_TEXTURES = ("plain", "stripes")
GROUND_TEXTURES = ("plain", "stripes", "fade")
TEXTURES = (*GROUND_TEXTURES, "dots", "checks")
_BODY_PITCH = 12.0
_GROUND_PITCH = 16.0
_DARK = (40, 34, 48)
_LIGHT = (250, 246, 236)


@dataclass(frozen=True, kw_only=True, slots=True)
class Paint:
    """Two colors and the texture that combines them. `angle`, in degrees, rotates the texture."""

    main: str
    accent: str
    texture: str
    angle: int = 0

    def words(self) -> str:
        """Describe the texture: "with white dots", "fading to white", or nothing."""
        if self.texture == "plain":
            return ""
        return f" fading to {self.accent}" if self.texture == "fade" else f" with {self.accent} {self.texture}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """How a picture is painted."""

    body: Paint
    ground: Paint


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What to draw and where. `shift` and `radius` in pixels, `tilt` in degrees; captions do not mention these."""

    thing: str
    shift: tuple[float, float] = (0.0, 0.0)
    tilt: float = 0.0
    radius: float = 23.0

    def center(self) -> tuple[float, float]:
        """Center of the thing in pixels."""
        return SIZE / 2 + self.shift[0], SIZE / 2 + self.shift[1]

    def caption(self) -> str:
        """Short caption: the name of the thing."""
        return _article(f"a {self.thing}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """`pixels` [64, 64, 3] uint8, `edges` [64, 64] uint8 (white lines), `mask` [64, 64] bool (the thing)."""

    look: Look
    layout: Layout
    pixels: NDArray[np.uint8]
    edges: NDArray[np.uint8]
    mask: NDArray[np.bool_]

    def image(self) -> Image.Image:
        """The picture as RGB."""
        return Image.fromarray(self.pixels)

    def edge_image(self) -> Image.Image:
        """The edge map as RGB, white lines on black, as expected by the edge ControlNet."""
        return Image.fromarray(self.edges).convert("RGB")

    def mask_image(self) -> Image.Image:
        """The thing as a white mask on black."""
        return Image.fromarray(self.mask.astype(np.uint8) * 255)

    def region_image(self) -> Image.Image:
        """The rectangle around the thing as a white mask on black."""
        region = Image.new("L", (SIZE, SIZE))
        region.paste(255, self.mask_image().getbbox())
        return region


def describe(look: Look, layout: Layout, keep: tuple[bool, bool, bool] = (True, True, True)) -> str:
    """Describe layout and look. `keep` selects parts: the thing's color, its texture, the background."""
    text = f"a {look.body.main} {layout.thing}" if keep[0] else f"a {layout.thing}"
    if keep[1]:
        text += look.body.words()
    if keep[2]:
        text += " on " + _article(f"a {look.ground.main} background{look.ground.words()}")
    return _article(text)


def sample_look(rng: random.Random) -> Look:
    """Draw a random look in which the thing stands out from the background."""
    while True:
        main, accent, ground, ground_accent = rng.sample(sorted(COLORS), 4)
        pairs = ((main, ground), (main, accent), (ground, ground_accent), (main, ground_accent), (accent, ground))
        if min(_distance(a, b) for a, b in pairs) > 110:
            break
    return Look(
        body=Paint(main=main, accent=accent, texture=rng.choice(BODY_TEXTURES), angle=rng.choice(ANGLES)),
        ground=Paint(main=ground, accent=ground_accent, texture=rng.choice(GROUND_TEXTURES), angle=rng.choice(ANGLES)),
    )


def sample_layout(rng: random.Random, thing: str | None = None) -> Layout:
    """Draw a random layout: a large thing near the center."""
    return Layout(thing=thing or rng.choice(tuple(THINGS)), shift=(rng.uniform(-3, 3), 0.0))


def render(look: Look, layout: Layout) -> Picture:
    """Paint the layout in the look."""
    thing = THINGS[layout.thing]
    center, radius = layout.center(), layout.radius
    body_polygons = [_placed(p, center, radius, layout.tilt) for p in thing.body]
    ink_polygons = [_placed(p, center, radius, layout.tilt) for p in thing.ink]
    body, ink = _filled(body_polygons), _filled(ink_polygons)
    ink_color = _LIGHT if sum(COLORS[look.body.main]) < 330 else _DARK

    pixels = _painted(look.ground, (SIZE / 2, SIZE / 2), SIZE / 2, _GROUND_PITCH)
    border = _LIGHT if sum(COLORS[look.ground.main]) < 330 else _DARK
    pixels = _over(pixels, np.array(border, np.float32), _grown(np.maximum(body, ink), 1))
    pixels = _over(pixels, _painted(look.body, center, radius, _BODY_PITCH, layout.tilt), body)
    pixels = _over(pixels, np.array(ink_color, np.float32), ink)
    edges = np.maximum(_edges(np.maximum(body, ink)), _edges(ink))
    return Picture(
        look=look,
        layout=layout,
        pixels=np.clip(pixels + 0.5, 0, 255).astype(np.uint8),
        edges=(np.clip(edges, 0, 1) * 255).astype(np.uint8),
        mask=np.maximum(body, ink) > 0.5,
    )


def picture(seed: int) -> Picture:
    """Render the picture for a seed."""
    rng = random.Random(seed)
    return render(sample_look(rng), sample_layout(rng))


def clip(look: Look, layout: Layout, frames: int = 16) -> NDArray[np.uint8]:
    """Render a looping clip in which the thing swings back and forth once: [frames, 64, 64, 3] uint8."""
    pictures = []
    for frame in range(frames):
        swing = math.sin(2 * math.pi * frame / frames)
        moved = replace(layout, shift=(3.5 * swing, layout.shift[1]))
        pictures.append(render(look, moved).pixels)
    return np.stack(pictures)


def _article(text: str) -> str:
    return "an" + text[1:] if text.startswith("a ") and text[2] in "aeiou" else text


def _distance(a: str, b: str) -> float:
    return math.dist(COLORS[a], COLORS[b])


def _placed(polygon: Polygon, center: tuple[float, float], radius: float, tilt: float) -> Polygon:
    cos, sin = math.cos(math.radians(tilt)) * radius, math.sin(math.radians(tilt)) * radius
    return [(center[0] + x * cos - y * sin, center[1] + x * sin + y * cos) for x, y in polygon]


def _filled(polygons: list[Polygon]) -> NDArray[np.float32]:
    """Rasterize polygons to coverage [64, 64] from 0 to 1."""
    canvas = Image.new("L", (SIZE * _OVERSAMPLING,) * 2)
    draw = ImageDraw.Draw(canvas)
    for polygon in polygons:
        draw.polygon([(x * _OVERSAMPLING, y * _OVERSAMPLING) for x, y in polygon], fill=255)
    return np.asarray(canvas.reduce(_OVERSAMPLING), np.float32) / 255


def _grown(coverage: NDArray[np.float32], pixels: int) -> NDArray[np.float32]:
    """Grow a shape by this many pixels."""
    image = Image.fromarray((coverage * 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.MaxFilter(2 * pixels + 1)), np.float32) / 255


def _edges(coverage: NDArray[np.float32]) -> NDArray[np.float32]:
    """Draw lines about two pixels wide where the coverage changes."""
    return _grown(coverage, 1) - (1 - _grown(1 - coverage, 1)) if coverage.any() else coverage


def _painted(
    paint: Paint, center: tuple[float, float], extent: float, pitch: float, tilt: float = 0.0
) -> NDArray[np.float32]:
    """Paint a texture on the whole canvas, [64, 64, 3], anchored at `center`; `extent` is half the length of a fade."""
    main, accent = np.array(COLORS[paint.main], np.float32), np.array(COLORS[paint.accent], np.float32)
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5
    x, y = x - center[0], y - center[1]
    angle = math.radians(paint.angle + tilt)
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    weight = np.clip(_accent(paint.texture, u, v, extent, pitch), 0, 1)[..., None]
    return main + (accent - main) * weight


def _accent(
    texture: str, u: NDArray[np.float32], v: NDArray[np.float32], extent: float, pitch: float
) -> NDArray[np.float32]:
    """Weight of the accent color at texture coordinates u, v (pixels); the caller clips it to 0..1."""
    if texture == "stripes":
        return _wave(u, pitch) + 0.5
    if texture == "checks":
        a, b = np.clip(_wave(u, pitch * 1.3), -0.5, 0.5), np.clip(_wave(v, pitch * 1.3), -0.5, 0.5)
        return 2 * a * b + 0.5
    if texture == "dots":
        cell_u, cell_v = ((u / pitch + 0.5) % 1 - 0.5) * pitch, ((v / pitch + 0.5) % 1 - 0.5) * pitch
        return 0.32 * pitch - np.hypot(cell_u, cell_v) + 0.5
    if texture == "fade":
        return 0.5 + 0.6 * u / extent
    return np.zeros_like(u)


def _wave(u: NDArray[np.float32], pitch: float) -> NDArray[np.float32]:
    """Signed distance in pixels to the nearest line between two stripes."""
    return (np.abs(u / pitch % 1 - 0.5) - 0.25) * pitch


def _over(below: NDArray[np.float32], above: NDArray[np.float32], coverage: NDArray[np.float32]) -> NDArray[np.float32]:
    return below + (above - below) * coverage[..., None]
