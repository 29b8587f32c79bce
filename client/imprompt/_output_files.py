"""Write pictures and clips as files, and say which files can be written."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo, putchunk

from imprompt._errors import invalid, short_repr
from imprompt._tensors import is_number

FPS = 8
"""Default frame rate of saved clips, which AnimateDiff's motion modules were trained for."""
_MAX_FPS = 1000
"""Animation formats store the duration of a frame in whole milliseconds."""
_ANIMATIONS = {".gif": "GIF", ".webp": "WEBP"}
_VIDEO = ".mp4"
_LATENTS = ".npy"
_PICTURE_FILES = "pictures must be saved as .png, .jpg or .webp"
_CLIP_FILES = "clips must be saved as .gif, .webp or .mp4"
_LATENT_FILES = "latents must be saved as .npy"
_PNG_HEADER_BYTES = 33
"""Length of the signature and the first chunk of a PNG file. Text may follow at once."""


def check_path(path: object) -> Path:
    """Return `path` as a `Path`, or raise `InvalidRequest`."""
    if not isinstance(path, str | os.PathLike):
        raise invalid("path", f"must be a file path, got {short_repr(path)}")
    return Path(path)


def check_fps(fps: object) -> None:
    """Raise `InvalidRequest` if `fps` is not a possible frame rate."""
    if not is_number(fps) or not 0 < fps <= _MAX_FPS:
        raise invalid("fps", f"must be a number above 0, at most {_MAX_FPS}; got {short_repr(fps)}")


def check_extension(path: Path, *, clip: bool = False, latents: bool = False) -> None:
    """Check that pictures (or clips, or latents) can be saved in the format of the file's extension.

    Raises:
        ValueError: they cannot, or the package for this format is missing.
    """
    if latents:
        if path.suffix.lower() != _LATENTS:
            raise ValueError(f"{path.name}: {_LATENT_FILES}")
    elif not clip:
        if not _pillow_writes(format_of(path)):
            raise ValueError(f"{path.name}: {_PICTURE_FILES}")
    elif path.suffix.lower() == _VIDEO:
        _imageio()
    elif path.suffix.lower() not in _ANIMATIONS:
        raise ValueError(f"{path.name}: {_CLIP_FILES}")


def _pillow_writes(format: str | None) -> bool:
    """Whether pillow can write pictures in `format`; some formats are read-only, and some need a plugin."""
    try:
        Image.new("RGB", (64, 64)).save(io.BytesIO(), format or "")
        return True
    except (KeyError, OSError, ValueError):
        return False


def format_of(path: Path) -> str | None:
    """Return pillow's name for the format of the file's extension, or None."""
    return Image.registered_extensions().get(path.suffix.lower(), "MP4" if path.suffix.lower() == _VIDEO else None)


def container(data: bytes) -> str | None:
    """Detect the format of an encoded picture or clip."""
    return "MP4" if data[4:8] == b"ftyp" else Image.open(io.BytesIO(data)).format


def encode_picture(image: Any, format: str | None) -> bytes:
    """Encode a PIL image or an array [height, width, 3] in one of pillow's formats."""
    file = io.BytesIO()
    _pil(image).save(file, format)
    return file.getvalue()


def save_clip(clip: Sequence[Any], path: Path, fps: float) -> None:
    """Save frames as an animation or a video, by the file's extension."""
    if path.suffix.lower() == _VIDEO:
        # PyAV encodes in this process. The ffmpeg plugin would fork it, which is unsafe with gRPC's threads running.
        pixels = np.stack([np.asarray(frame) for frame in clip])
        _imageio().imwrite(path, pixels, fps=fps, plugin="pyav", codec="libx264")
    else:
        with path.open("wb") as file:
            write_animation(clip, file, _ANIMATIONS[path.suffix.lower()], fps)


def write_animation(clip: Sequence[Any], file: BinaryIO, format: str, fps: float) -> None:
    """Write frames as an animation that plays in a loop."""
    first, *rest = map(_pil, clip)
    first.save(file, format, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)


def with_png_text(png: bytes, texts: Mapping[str, str]) -> bytes:
    """Insert text chunks into a PNG file: tEXt, or iTXt for text outside of Latin-1."""
    info, chunks = PngInfo(), io.BytesIO()
    for keyword, text in texts.items():
        info.add_text(keyword, text)
    for kind, data, _ in info.chunks:
        putchunk(chunks, kind, data)
    return png[:_PNG_HEADER_BYTES] + chunks.getvalue() + png[_PNG_HEADER_BYTES:]


def _pil(image: Any) -> Image.Image:
    return image if isinstance(image, Image.Image) else Image.fromarray(image)


def _imageio() -> Any:
    try:
        from imageio import v3
        from imageio.plugins import pyav  # noqa: F401
    except ImportError:
        raise ValueError(
            f'saving {_VIDEO} requires: pip install "imageio[pyav]" (.gif and .webp work without it)'
        ) from None
    return v3
