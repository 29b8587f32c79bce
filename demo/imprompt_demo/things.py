"""The things of the picture world, as polygons.

Coordinates range from -1 to 1 on both axes (x right, y down). `body` polygons are filled with the texture of the look,
`ink` polygons are small details in a single dark or light color.
"""

import math
from dataclasses import dataclass, field

Polygon = list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Thing:
    """Silhouette and details of one thing."""

    body: list[Polygon]
    ink: list[Polygon] = field(default_factory=list)


def _ellipse(x: float, y: float, rx: float, ry: float, corners: int = 48) -> Polygon:
    angles = [2 * math.pi * i / corners for i in range(corners)]
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


def _box(left: float, top: float, right: float, bottom: float) -> Polygon:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _star() -> Polygon:
    radii = [1.0, 0.45] * 5
    return [(r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5)) for i, r in enumerate(radii)]


def _heart() -> Polygon:
    points = []
    for i in range(48):
        t = 2 * math.pi * i / 48
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((math.sin(t) ** 3, -(y + 2.5) / 15.5))
    return points


def _flower() -> Polygon:
    points = []
    for i in range(72):
        t = 2 * math.pi * i / 72
        r = 0.76 + 0.24 * math.cos(5 * t)
        points.append((r * math.sin(t), -r * math.cos(t)))
    return points


def _moon() -> Polygon:
    outer = [(math.cos(a), math.sin(a)) for a in (math.radians(d) for d in range(50, 311, 10))]
    inner = [(0.42 + 0.8 * math.cos(a), 0.8 * math.sin(a)) for a in (math.radians(d) for d in range(285, 74, -10))]
    return [(x + 0.2, y) for x, y in outer + inner]


def _smile() -> Polygon:
    upper = [(0.55 * math.cos(a), 0.15 + 0.3 * math.sin(a)) for a in (math.radians(d) for d in range(0, 181, 15))]
    lower = [(0.55 * math.cos(a), 0.15 + 0.55 * math.sin(a)) for a in (math.radians(d) for d in range(180, -1, -15))]
    return upper + lower


THINGS: dict[str, Thing] = {
    "circle": Thing(body=[_ellipse(0, 0, 0.9, 0.9)]),
    "square": Thing(body=[_box(-0.8, -0.8, 0.8, 0.8)]),
    "triangle": Thing(body=[[(0, -0.95), (0.98, 0.8), (-0.98, 0.8)]]),
    "star": Thing(body=[_star()]),
    "heart": Thing(body=[_heart()]),
    "flower": Thing(body=[_flower()], ink=[_ellipse(0, 0, 0.28, 0.28)]),
    "moon": Thing(body=[_moon()]),
    "house": Thing(
        body=[[(0, -1), (1, -0.15), (0.78, -0.15), (0.78, 0.9), (-0.78, 0.9), (-0.78, -0.15), (-1, -0.15)]],
        ink=[_box(-0.22, 0.25, 0.22, 0.9)],
    ),
    "tree": Thing(
        body=[[(0, -1), (0.6, -0.25), (-0.6, -0.25)], [(0, -0.6), (0.85, 0.5), (-0.85, 0.5)]],
        ink=[_box(-0.18, 0.5, 0.18, 1.0)],
    ),
    "fish": Thing(
        body=[_ellipse(-0.2, 0, 0.8, 0.55), [(0.35, 0), (1, -0.6), (1, 0.6)]], ink=[_ellipse(-0.6, -0.12, 0.13, 0.13)]
    ),
    "boat": Thing(
        body=[[(-1, 0.35), (1, 0.35), (0.65, 0.9), (-0.65, 0.9)], [(0.08, -1), (0.85, 0.2), (0.08, 0.2)]],
        ink=[_box(-0.08, -1.0, 0.06, 0.35)],
    ),
    "face": Thing(
        body=[_ellipse(0, 0, 0.95, 0.95)],
        ink=[_ellipse(-0.35, -0.25, 0.14, 0.18), _ellipse(0.35, -0.25, 0.14, 0.18), _smile()],
    ),
}
