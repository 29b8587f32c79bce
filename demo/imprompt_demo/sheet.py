"""A sheet of labelled pictures, in rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

CELL, GAP, LINE, TITLE = 128, 10, 18, 150
"""Pixels: side of a picture, space between two, height of a line of text, width of the column of titles."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A title and pictures, each with its caption."""

    title: str
    cells: list[tuple[str, Image.Image]]


def draw(rows: Sequence[Row]) -> Image.Image:
    """The rows below each other on white; pictures are enlarged to `CELL` pixels."""
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
