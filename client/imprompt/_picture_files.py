"""Read picture files: from paths, web addresses, and data URIs."""

from __future__ import annotations

import base64
import os
from pathlib import Path

from imprompt._download import SCHEMES, download
from imprompt._errors import invalid, short_repr

FORMATS = "PNG, JPEG, WebP, GIF, BMP or AVIF"
_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"BM")
_AVIF_BRANDS = (b"avif", b"avis")
_DATA_URI = "data:"
_VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
_VIDEO_HINT = "of other videos, pass the frames as a list or an array"


def read_file(source: str | os.PathLike[str] | bytes | bytearray | memoryview, parameter: str) -> bytes:
    """Return the bytes of a picture file, given as such or by its path, web address, or data URI.

    Raises:
        InvalidRequest: the file cannot be read, or does not start like one of the supported formats.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return _checked(bytes(source), "the data", parameter)
    if isinstance(source, str) and source.startswith(SCHEMES):
        return _checked(download(source, parameter), source.partition("?")[0][:200], parameter)
    if isinstance(source, str) and not is_path(source):
        return _checked(_from_data_uri(source, parameter), "the data URI", parameter)
    name = short_repr(str(source))
    if isinstance(source, str | os.PathLike) and str(source).lower().endswith(_VIDEOS):
        raise invalid(parameter, f"{name} cannot be read: {FORMATS} files are supported; {_VIDEO_HINT}")
    return _checked(_read(source, parameter), name, parameter)


def is_path(source: str) -> bool:
    """Whether `source` names a file on this machine, rather than being a web address or a data URI."""
    return not source.startswith(SCHEMES) and source[: len(_DATA_URI)].lower() != _DATA_URI


def _read(path: str | os.PathLike[str], parameter: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise invalid(parameter, f"no such file: {path}") from None
    except OSError as error:
        raise invalid(parameter, f"cannot read {path}: {error.strerror or error}") from None
    except (TypeError, ValueError) as error:  # a bytes path, or characters that no path can contain
        raise invalid(parameter, f"{short_repr(path)} is not a valid path: {error}") from None


def _from_data_uri(text: str, parameter: str) -> bytes:
    header, comma, data = text.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise invalid(parameter, "a data URI must start like `data:image/png;base64,`")
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except ValueError as error:
        raise invalid(parameter, f"the data URI is not valid base64: {error}") from None


def _checked(data: bytes, what: str, parameter: str) -> bytes:
    """Return `data` if it starts like a supported format; only the client knows the file name for the error."""
    if not data:
        raise invalid(parameter, f"{what} is empty; expected a {FORMATS} file")
    is_webp = data.startswith(b"RIFF") and data[8:12] == b"WEBP"
    is_avif = data[4:8] == b"ftyp" and any(brand in data[8:64] for brand in _AVIF_BRANDS)
    if not (is_webp or is_avif or data.startswith(_SIGNATURES)):
        raise invalid(parameter, f"{what} is not a {FORMATS} picture")
    return data
