"""Show results in notebooks: one picture as such, several and clips as a row of HTML."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from imprompt._output_files import FPS, encode_picture, write_animation

_SIDE = 384
"""Longest side of a picture in a row, in pixels: a notebook keeps all of them in its file."""


def png(images: Sequence[Any]) -> bytes | None:
    """Encode a single picture; None if there is none, or several."""
    return encode_picture(images[0], "PNG") if len(images) == 1 else None


def row(images: Sequence[Any], clips: Sequence[Sequence[Any]] | None, seeds: Sequence[int]) -> str | None:
    """Return HTML for several pictures, or for clips; None if there are none."""
    if clips:
        files = [("webp", _animation(clip)) for clip in clips]
    elif len(images) > 1:
        files = [("jpeg", encode_picture(_small(image), "JPEG")) for image in images]
    else:
        return None
    captions = [f"seed {seed}" for seed in seeds] or [f"{index + 1} of {len(files)}" for index in range(len(files))]
    figures = (
        f'<figure style="margin: 0"><img src="data:image/{kind};base64,{base64.b64encode(data).decode()}" '
        f'alt="{html.escape(caption)}"><figcaption>{html.escape(caption)}</figcaption></figure>'
        for (kind, data), caption in zip(files, captions, strict=True)
    )
    return f'<div style="display: flex; flex-wrap: wrap; gap: 8px">{"".join(figures)}</div>'


def _animation(clip: Sequence[Any]) -> bytes:
    file = io.BytesIO()
    write_animation([_small(frame) for frame in clip], file, "WEBP", FPS)
    return file.getvalue()


def _small(image: Any) -> Image.Image:
    small = image.copy() if isinstance(image, Image.Image) else Image.fromarray(image)
    small.thumbnail((_SIDE, _SIDE))
    return small.convert("RGB")
