"""The picture world: flat, bold 64 x 64 pictures, each made of a *layout* and a *look*.

The layout says what is seen and where: the object, its size, its place. The look says how it is painted: four colours,
the texture of the object and of the ground. A short caption names the layout only; the look is what an
image prompt has to carry. A full description names both.

Everything is deterministic: the same `random.Random` state gives the same picture.
"""

import math
import random
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from .things import THINGS, Polygon

SIZE = 64
"""Side of a picture in pixels."""

_OVERSAMPLING = 4

COLOURS: dict[str, tuple[int, int, int]] = {
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
TEXTURES = ("plain", "stripes", "dots", "checks", "fade")
SIZES: dict[str, float] = {"small": 16.0, "": 20.5, "big": 26.0}
PLACES: dict[str, tuple[float, float]] = {
    "": (0, 0),
    "on the left": (-12, 0),
    "on the right": (12, 0),
    "at the top": (0, -11),
    "at the bottom": (0, 11),
}
_BODY_PITCH = 12.0
_GROUND_PITCH = 16.0
_DARK = (40, 34, 48)
_LIGHT = (250, 246, 236)


@dataclass(frozen=True, kw_only=True, slots=True)
class Paint:
    """Two colours and how they are mixed. `angle` in degrees turns the texture."""

    main: str
    accent: str
    texture: str
    angle: int = 0

    def words(self) -> str:
        """The texture in words: "with white dots", "fading to white", or nothing."""
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
    """What is seen and where. `shift` in pixels and `tilt` in degrees are small and not told by captions."""

    thing: str
    size: str = ""
    place: str = ""
    shift: tuple[float, float] = (0.0, 0.0)
    tilt: float = 0.0

    def centre(self) -> tuple[float, float]:
        """Middle of the object in pixels."""
        x, y = PLACES[self.place]
        return SIZE / 2 + x + self.shift[0], SIZE / 2 + y + self.shift[1]

    def caption(self) -> str:
        """The short caption: object, size, place."""
        return _article(" ".join(word for word in ("a", self.size, self.thing, self.place) if word))


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """`pixels` [64, 64, 3] uint8, `edges` [64, 64] uint8 (white lines), `mask` [64, 64] bool (the object)."""

    look: Look
    layout: Layout
    pixels: NDArray[np.uint8]
    edges: NDArray[np.uint8]
    mask: NDArray[np.bool_]

    def image(self) -> Image.Image:
        """The picture as RGB."""
        return Image.fromarray(self.pixels)

    def edge_image(self) -> Image.Image:
        """The edge map as RGB, white lines on black: what the edge ControlNet takes."""
        return Image.fromarray(self.edges).convert("RGB")

    def mask_image(self) -> Image.Image:
        """The object as a white mask on black."""
        return Image.fromarray(self.mask.astype(np.uint8) * 255)


def describe(look: Look, layout: Layout, keep: tuple[bool, ...] = (True,) * 5) -> str:
    """The full description. `keep` drops parts: size, body colour, body texture, place, ground."""
    words = ["a"]
    if keep[0] and layout.size:
        words.append(layout.size)
    if keep[1]:
        words.append(look.body.main)
    text = " ".join([*words, layout.thing])
    if keep[2]:
        text += look.body.words()
    if keep[3] and layout.place:
        text += f" {layout.place}"
    if keep[4]:
        text += " on " + _article(f"a {look.ground.main} background{look.ground.words()}")
    return _article(text)


def sample_look(rng: random.Random) -> Look:
    """A look whose object stands out from its ground."""
    while True:
        main, accent, ground, ground_accent = rng.sample(sorted(COLOURS), 4)
        pairs = ((main, ground), (main, accent), (ground, ground_accent), (main, ground_accent), (accent, ground))
        if min(_distance(a, b) for a, b in pairs) > 110:
            break
    return Look(
        body=Paint(main=main, accent=accent, texture=rng.choice(TEXTURES), angle=rng.choice(ANGLES)),
        ground=Paint(main=ground, accent=ground_accent, texture=rng.choice(TEXTURES), angle=rng.choice(ANGLES)),
    )


def sample_layout(rng: random.Random, thing: str | None = None) -> Layout:
    """A layout; big objects stay in the middle."""
    size = rng.choice(tuple(SIZES))
    return Layout(
        thing=thing or rng.choice(tuple(THINGS)),
        size=size,
        place="" if size == "big" else rng.choice(tuple(PLACES)),
        shift=(rng.uniform(-2, 2), rng.uniform(-2, 2)),
        tilt=rng.uniform(-8, 8),
    )


def render(look: Look, layout: Layout) -> Picture:
    """Paint the layout in the look."""
    thing = THINGS[layout.thing]
    centre, radius = layout.centre(), SIZES[layout.size]
    body_polygons = [_placed(p, centre, radius, layout.tilt) for p in thing.body]
    ink_polygons = [_placed(p, centre, radius, layout.tilt) for p in thing.ink]
    body, ink = _filled(body_polygons), _filled(ink_polygons)
    ink_colour = _LIGHT if sum(COLOURS[look.body.main]) < 330 else _DARK

    pixels = _painted(look.ground, (SIZE / 2, SIZE / 2), SIZE / 2, _GROUND_PITCH)
    border = _LIGHT if sum(COLOURS[look.ground.main]) < 330 else _DARK
    pixels = _over(pixels, np.array(border, np.float32), _grown(np.maximum(body, ink), 1))
    pixels = _over(pixels, _painted(look.body, centre, radius, _BODY_PITCH, layout.tilt), body)
    pixels = _over(pixels, np.array(ink_colour, np.float32), ink)
    edges = np.maximum(_edges(np.maximum(body, ink)), _edges(ink))
    return Picture(
        look=look,
        layout=layout,
        pixels=np.clip(pixels + 0.5, 0, 255).astype(np.uint8),
        edges=(np.clip(edges, 0, 1) * 255).astype(np.uint8),
        mask=np.maximum(body, ink) > 0.5,
    )


def picture(seed: int) -> Picture:
    """The picture of a seed."""
    rng = random.Random(seed)
    return render(sample_look(rng), sample_layout(rng))


def clip(look: Look, layout: Layout, frames: int = 16, axis: str = "x", reach: float = 9.0) -> NDArray[np.uint8]:
    """The object swings once to and fro along an axis: [frames, 64, 64, 3] uint8. `reach` in pixels; the clip loops."""
    pictures = []
    for frame in range(frames):
        swing = reach * math.sin(2 * math.pi * frame / frames)
        x, y = layout.shift
        moved = (x + swing, y) if axis == "x" else (x, y + swing)
        pictures.append(render(look, replace(layout, shift=moved)).pixels)
    return np.stack(pictures)


def _article(text: str) -> str:
    return "an" + text[1:] if text.startswith("a ") and text[2] in "aeiou" else text


def _distance(a: str, b: str) -> float:
    return math.dist(COLOURS[a], COLOURS[b])


def _placed(polygon: Polygon, centre: tuple[float, float], radius: float, tilt: float) -> Polygon:
    cos, sin = math.cos(math.radians(tilt)) * radius, math.sin(math.radians(tilt)) * radius
    return [(centre[0] + x * cos - y * sin, centre[1] + x * sin + y * cos) for x, y in polygon]


def _filled(polygons: list[Polygon]) -> NDArray[np.float32]:
    """Coverage [64, 64] from 0 to 1."""
    canvas = Image.new("L", (SIZE * _OVERSAMPLING,) * 2)
    draw = ImageDraw.Draw(canvas)
    for polygon in polygons:
        draw.polygon([(x * _OVERSAMPLING, y * _OVERSAMPLING) for x, y in polygon], fill=255)
    return np.asarray(canvas.reduce(_OVERSAMPLING), np.float32) / 255


def _grown(coverage: NDArray[np.float32], pixels: int) -> NDArray[np.float32]:
    """The same shape with a rim of that many pixels added."""
    image = Image.fromarray((coverage * 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.MaxFilter(2 * pixels + 1)), np.float32) / 255


def _edges(coverage: NDArray[np.float32]) -> NDArray[np.float32]:
    """Lines about two pixels wide where the coverage changes."""
    return _grown(coverage, 1) - (1 - _grown(1 - coverage, 1)) if coverage.any() else coverage


def _painted(
    paint: Paint, centre: tuple[float, float], extent: float, pitch: float, tilt: float = 0.0
) -> NDArray[np.float32]:
    """The texture over the whole canvas, [64, 64, 3], anchored at `centre`; `extent` is the half length of a fade."""
    main, accent = np.array(COLOURS[paint.main], np.float32), np.array(COLOURS[paint.accent], np.float32)
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5
    x, y = x - centre[0], y - centre[1]
    angle = math.radians(paint.angle + tilt)
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    weight = np.clip(_accent(paint.texture, u, v, extent, pitch), 0, 1)[..., None]
    return main + (accent - main) * weight


def _accent(
    texture: str, u: NDArray[np.float32], v: NDArray[np.float32], extent: float, pitch: float
) -> NDArray[np.float32]:
    """How much of the accent colour shows at texture coordinates u, v (pixels); values beyond 0..1 are clipped."""
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
