"""Draw a contact sheet: rows of labeled pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

CELL, GAP, LINE, TITLE = 128, 10, 18, 150
"""In pixels: side of a picture, gap between pictures, height of a text line, width of the title column."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A title, and pictures with captions."""

    title: str
    cells: list[tuple[str, Image.Image]]


def draw(rows: Sequence[Row]) -> Image.Image:
    """Draw the rows below each other on white, with pictures enlarged to `CELL` pixels."""
    height = CELL + LINE + GAP
    width = TITLE + max(len(row.cells) for row in rows) * (CELL + GAP) + GAP
    canvas = Image.new("RGB", (width, GAP + len(rows) * height), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for index, row in enumerate(rows):
        top = GAP + index * height
        pen.multiline_text((GAP, top + 4), row.title, fill="black", font=font, spacing=5)
        for column, (caption, picture) in enumerate(row.cells):
            left = TITLE + column * (CELL + GAP)
            shown = picture.convert("RGB").resize((CELL, CELL), Image.Resampling.BICUBIC)
            canvas.paste(shown, (left, top))
            pen.text((left, top + CELL + 2), caption, fill="black", font=font)
    return canvas
