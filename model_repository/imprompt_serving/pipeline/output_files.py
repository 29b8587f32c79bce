"""Encode pictures and clips as files (`output_format`)."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

from imprompt_serving.pipeline.models import strings

FRAME_MS = 125
"""Milliseconds per frame: eight frames per second, as AnimateDiff's motion modules were trained on."""
_OPTIONS: dict[str, dict[str, Any]] = {"jpeg": {"quality": 95}, "webp": {"quality": 95}}


def picture_file(picture: np.ndarray, kind: str) -> bytes:
    """Encode a picture [height, width, 3] in one of `parameters.PICTURE_FORMATS`."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind, **_OPTIONS.get(kind, {}))
    return file.getvalue()


def video_file(frames: np.ndarray, kind: str) -> bytes:
    """Encode a clip [F, height, width, 3] in one of `parameters.VIDEO_FORMATS`, playing in a loop."""
    first, *rest = [Image.fromarray(frame) for frame in frames]
    file = io.BytesIO()
    options = _OPTIONS.get(kind, {})
    first.save(file, kind, save_all=True, append_images=rest, duration=FRAME_MS, loop=0, **options)
    return file.getvalue()


def file_tensor(files: Iterable[bytes], encoding: str) -> np.ndarray:
    """Make the output tensor of some files, in one of the encodings of `output_encoding`."""
    return strings(*(base64.b64encode(file) if encoding == "base64" else file for file in files))
