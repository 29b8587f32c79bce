"""Encode pictures as the server expects them: bytes of a PNG, JPEG or WebP file."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from imprompt._errors import InvalidRequest, invalid, short_repr

ImageInput: TypeAlias = Image.Image | str | os.PathLike[str] | bytes | np.ndarray[Any, Any]
"""A PIL image, a path, encoded bytes (PNG, JPEG, WebP), or a uint8 array [height, width, 1, 3 or 4 channels]."""

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
"""Pillow modes that PNG supports directly."""
_ALPHA_MODES = {"La": "LA", "PA": "RGBA", "RGBa": "RGBA"}
# Speed over size: on a fast network, compressing takes longer than transferring.
_PNG_OPTIONS = {"compress_level": 1}
_FORMATS = "PNG, JPEG or WebP"

Encoder: TypeAlias = Callable[[object, str], bytes]


def encode(image: object, parameter: str) -> bytes:
    """Encode one picture: files and bytes pass through unchanged, anything else becomes a PNG and keeps its alpha.

    Raises:
        InvalidRequest: `image` is not a picture, or its file cannot be read.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return _check_format(bytes(image), "the data", parameter)
    if isinstance(image, str | os.PathLike):
        return _check_format(_read(image, parameter), short_repr(str(image)), parameter)
    if isinstance(image, Image.Image):
        return _png(image, parameter)
    if hasattr(image, "__array__"):
        return _png(_from_array(to_numpy(image, parameter), parameter), parameter)
    raise invalid(parameter, f"must be a PIL image, a path, encoded bytes or a uint8 array, not {type(image).__name__}")


def encode_mask(mask: object, parameter: str) -> bytes:
    """Encode one mask; arrays (uint8, bool, or floats from 0 to 1) become 8-bit grayscale PNGs.

    Other pictures keep their mode: like diffusers, the server resizes masks before converting them to grayscale.
    """
    if isinstance(mask, Image.Image) and mask.mode == "F":
        mask = np.asarray(mask)
    if hasattr(mask, "__array__") and not isinstance(mask, Image.Image):
        values = to_numpy(mask, parameter)
        if values.dtype.kind == "f":
            if not ((values >= 0) & (values <= 1)).all():
                raise invalid(parameter, "values of a float mask must be 0 to 1")
            values = (values * 255).round().astype(np.uint8)
        elif values.dtype == np.bool_:
            values = values.astype(np.uint8) * 255
        return _png(_from_array(values, parameter).convert("L"), parameter)
    return encode(mask, parameter)


def encode_all(images: Sequence[object], parameter: str, encoder: Encoder = encode) -> list[bytes]:
    """Encode the pictures of a parameter; if there are several, an error says which one is at fault."""
    encoded = []
    for index, image in enumerate(images):
        try:
            encoded.append(encoder(image, parameter))
        except InvalidRequest as error:
            if len(images) == 1:
                raise
            problem = str(error).removeprefix(f"{parameter}: ")
            raise invalid(parameter, f"picture {index + 1} of {len(images)}: {problem}") from error.__cause__
    return encoded


def as_list(images: object, parameter: str) -> list[object]:
    """List the pictures in a single picture, a list, or an array [pictures, height, width, channels]."""
    if isinstance(images, Sequence) and not isinstance(images, str | bytes | bytearray | memoryview):
        return list(images)
    if hasattr(images, "__array__") and not isinstance(images, Image.Image):
        array = to_numpy(images, parameter)
        return list(array) if array.ndim == 4 else [array]
    return [images]


def as_mask_list(masks: object, parameter: str) -> list[object]:
    """List one adapter's masks; an array is [H, W], [n, H, W], or diffusers' [1, n, H, W] or [n, 1, H, W]."""
    if hasattr(masks, "__array__") and not isinstance(masks, Image.Image):
        array = to_numpy(masks, parameter)
        return list(array.reshape(-1, *array.shape[-2:])) if array.ndim in (2, 3, 4) and array.size else [array]
    return [
        mask
        for entry in as_list(masks, parameter)
        for mask in (as_mask_list(entry, parameter) if hasattr(entry, "__array__") else [entry])
    ]


def flatten_control_images(images: object, *, clip: bool) -> object:
    """Flatten a list of lists of control images: all images of the first ControlNet, then those of the next.

    As in diffusers, an inner list holds the frames of one ControlNet for clips, and one image per ControlNet (for the
    same prompt) for pictures.
    """
    if not isinstance(images, list | tuple) or not images or not all(isinstance(part, list | tuple) for part in images):
        return images
    if not clip and len({len(part) for part in images}) > 1:
        lengths = short_repr([len(part) for part in images])
        raise invalid("control_image", f"every inner list must have one image per ControlNet; got lengths {lengths}")
    return [image for part in (images if clip else zip(*images, strict=True)) for image in part]


def to_numpy(values: Any, parameter: str) -> np.ndarray[Any, Any]:
    """Convert an array, a torch tensor (on any device, of any float type) or nested numbers to a numpy array.

    Raises:
        InvalidRequest: numpy cannot convert it.
    """
    try:
        if hasattr(values, "detach"):
            values = values.detach().cpu()
            if values.is_floating_point():
                values = values.float()  # numpy has no bfloat16
        return np.asarray(values)
    except Exception:  # ragged or deeply nested lists, and anything a caller's object raises
        raise invalid(parameter, f"must be a value or an array, got {short_repr(values)}") from None


def decode(data: bytes) -> Image.Image:
    """Decode a picture sent by the server."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def _read(path: str | os.PathLike[str], parameter: str) -> bytes:
    try:
        if str(path).startswith(("http://", "https://")):
            raise invalid(parameter, f"{path} is a URL; download it and pass the bytes")
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise invalid(parameter, f"no such file: {path}") from None
    except OSError as error:
        raise invalid(parameter, f"cannot read {path}: {error.strerror or error}") from None
    except (TypeError, ValueError) as error:  # a bytes path, or characters that no path can contain
        if isinstance(error, InvalidRequest):
            raise
        raise invalid(parameter, f"{short_repr(path)} is not a valid path: {error}") from None


def _check_format(data: bytes, what: str, parameter: str) -> bytes:
    """Return `data` if it starts like a supported format; only the client knows the file name for the error."""
    if not data:
        raise invalid(parameter, f"{what} is empty; expected a {_FORMATS} file")
    if not data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")) and not (
        data.startswith(b"RIFF") and data[8:12] == b"WEBP"
    ):
        raise invalid(parameter, f"{what} is not a {_FORMATS} picture")
    return data


def _from_array(array: np.ndarray[Any, Any], parameter: str) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if (
        array.dtype != np.uint8
        or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4)))
        or not array.size
    ):
        raise invalid(
            parameter,
            f"an array must be uint8 [height, width, 1, 3 or 4 channels], not {array.dtype} {list(array.shape)}",
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _png(image: Image.Image, parameter: str) -> bytes:
    if not image.width or not image.height:
        raise invalid(parameter, f"the picture has no pixels ({image.width}x{image.height})")
    buffer = io.BytesIO()
    try:
        _to_png_mode(image, parameter).save(buffer, "PNG", **_PNG_OPTIONS)
    except InvalidRequest:
        raise
    except Exception as error:  # pillow loads lazily, so a damaged or closed file fails only here
        raise invalid(parameter, f"the picture cannot be read: {error}") from None
    return buffer.getvalue()


def _to_png_mode(image: Image.Image, parameter: str) -> Image.Image:
    """Convert `image` to a mode that PNG supports."""
    if image.mode in _PNG_MODES:
        return image
    if image.mode == "F":
        raise invalid(parameter, "mode F has no fixed range of values; scale the picture to 0..255, convert it to L")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= 2**16:
            raise invalid(parameter, f"values of a mode {image.mode} picture must be 0 to 65535, not {low} to {high}")
        return Image.fromarray(values.astype(np.uint16))
    return image.convert(_ALPHA_MODES.get(image.mode, "RGB"))
