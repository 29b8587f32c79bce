"""Pictures as the server takes them: encoded bytes."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from imprompt._errors import InvalidRequest, invalid, shown

ImageInput: TypeAlias = Image.Image | str | os.PathLike[str] | bytes | np.ndarray[Any, Any]
"""A picture: PIL image, path, encoded bytes (PNG, JPEG, WebP), or a uint8 array [height, width, 1, 3 or 4 channels]."""

_SENT_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
"""Modes of pillow that PNG has, too."""
_ALPHA_MODES = {"La": "LA", "PA": "RGBA", "RGBa": "RGBA"}
# Speed over size: on a fast network the encoding takes longer than the transfer.
_PNG_OPTIONS = {"compress_level": 1}
_FORMATS = "PNG, JPEG or WebP"

Encoder: TypeAlias = Callable[[object, str], bytes]


def encode(image: object, parameter: str) -> bytes:
    """One picture as encoded bytes: files and bytes as they are, all else as PNG with its alpha channel kept.

    Raises:
        InvalidRequest: not a picture, or a file that cannot be read.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return _checked(bytes(image), "the bytes", parameter)
    if isinstance(image, str | os.PathLike):
        return _checked(_read(image, parameter), shown(str(image)), parameter)
    if isinstance(image, Image.Image):
        return _png(image, parameter)
    if hasattr(image, "__array__"):
        return _png(_from_array(to_numpy(image, parameter), parameter), parameter)
    raise invalid(
        parameter, f"a picture is a PIL image, a path, encoded bytes or a uint8 array, not {type(image).__name__}"
    )


def encode_mask(mask: object, parameter: str) -> bytes:
    """One mask as encoded bytes; arrays (uint8, or floats 0 to 1) as 8-bit grey PNG.

    Other pictures keep their mode: the server resizes before it makes them grey, as diffusers does.
    """
    if isinstance(mask, Image.Image) and mask.mode == "F":
        mask = np.asarray(mask)
    if hasattr(mask, "__array__") and not isinstance(mask, Image.Image):
        values = to_numpy(mask, parameter)
        if values.dtype.kind == "f":
            if not ((values >= 0) & (values <= 1)).all():
                raise invalid(parameter, "a mask of floats is 0 to 1")
            values = (values * 255).round().astype(np.uint8)
        elif values.dtype == np.bool_:
            values = values.astype(np.uint8) * 255
        return _png(_from_array(values, parameter).convert("L"), parameter)
    return encode(mask, parameter)


def encode_all(images: Sequence[object], parameter: str, encoder: Encoder = encode) -> list[bytes]:
    """Pictures of a parameter; of several, an error says which one it is about."""
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


def listed(images: object, parameter: str) -> list[object]:
    """One picture, a list of them or an array [pictures, height, width, channels], as a list."""
    if isinstance(images, Sequence) and not isinstance(images, str | bytes | bytearray | memoryview):
        return list(images)
    if hasattr(images, "__array__") and not isinstance(images, Image.Image):
        array = to_numpy(images, parameter)
        return list(array) if array.ndim == 4 else [array]
    return [images]


def listed_masks(masks: object, parameter: str) -> list[object]:
    """Masks of one adapter as a list; an array is [H, W], [n, H, W], or diffusers' [1, n, H, W], [n, 1, H, W]."""
    if hasattr(masks, "__array__") and not isinstance(masks, Image.Image):
        array = to_numpy(masks, parameter)
        return list(array.reshape(-1, *array.shape[-2:])) if array.ndim in (2, 3, 4) and array.size else [array]
    return [
        mask
        for entry in listed(masks, parameter)
        for mask in (listed_masks(entry, parameter) if hasattr(entry, "__array__") else [entry])
    ]


def by_net(images: object, *, clip: bool) -> object:
    """Control images that come as lists in a list, as a flat list: all those of the first net, then of the next.

    As in diffusers an inner list holds what belongs to one net for clips (its frames), and what belongs to one prompt
    (an image for each net) for pictures.
    """
    if not isinstance(images, list | tuple) or not images or not all(isinstance(part, list | tuple) for part in images):
        return images
    if not clip and len({len(part) for part in images}) > 1:
        raise invalid("control_image", f"an image for each net in every list; got {shown([len(p) for p in images])}")
    return [image for part in (images if clip else zip(*images, strict=True)) for image in part]


def to_numpy(values: Any, parameter: str) -> np.ndarray[Any, Any]:
    """An array, a torch tensor (of any device and float type) or nested numbers, as a numpy array.

    Raises:
        InvalidRequest: numpy makes no array of it.
    """
    try:
        if hasattr(values, "detach"):
            values = values.detach().cpu()
            if values.is_floating_point():
                values = values.float()  # numpy has no bfloat16
        return np.asarray(values)
    except Exception:  # lists of uneven lengths, too deep ones, and whatever an object of the caller's raises
        raise invalid(parameter, f"takes plain values or arrays, got {shown(values)}") from None


def decode(data: bytes) -> Image.Image:
    """A picture of the server."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def _read(path: str | os.PathLike[str], parameter: str) -> bytes:
    try:
        if str(path).startswith(("http://", "https://")):
            raise invalid(parameter, f"{path} is a web address; fetch it and pass the bytes")
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise invalid(parameter, f"no such file: {path}") from None
    except OSError as error:
        raise invalid(parameter, f"{path} cannot be read: {error.strerror or error}") from None
    except (TypeError, ValueError) as error:  # a path of bytes, or with characters that no path has
        if isinstance(error, InvalidRequest):
            raise
        raise invalid(parameter, f"{shown(path)} is no path: {error}") from None


def _checked(data: bytes, what: str, parameter: str) -> bytes:
    """`data`, if it begins as the server's formats do: a wrong file is best named where its name is known."""
    if not data:
        raise invalid(parameter, f"empty: {what}; a picture is a {_FORMATS} file")
    if not data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")) and not (
        data.startswith(b"RIFF") and data[8:12] == b"WEBP"
    ):
        raise invalid(parameter, f"not a {_FORMATS} picture: {what}")
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
            parameter, f"an array is uint8 [height, width, 1, 3 or 4 channels], not {array.dtype} {list(array.shape)}"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _png(image: Image.Image, parameter: str) -> bytes:
    if not image.width or not image.height:
        raise invalid(parameter, f"the picture has no pixels ({image.width}x{image.height})")
    buffer = io.BytesIO()
    try:
        _sent(image, parameter).save(buffer, "PNG", **_PNG_OPTIONS)
    except InvalidRequest:
        raise
    except Exception as error:  # a file that is damaged or closed shows when its pixels are wanted
        raise invalid(parameter, f"the picture cannot be read: {error}") from None
    return buffer.getvalue()


def _sent(image: Image.Image, parameter: str) -> Image.Image:
    """`image` in a mode that PNG has."""
    if image.mode in _SENT_MODES:
        return image
    if image.mode == "F":
        raise invalid(parameter, "a picture of mode F has no fixed range; scale it to 0 to 255 and convert it to L")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= 2**16:
            raise invalid(parameter, f"a picture of mode {image.mode} holds 0 to 65535, not {low} to {high}")
        return Image.fromarray(values.astype(np.uint16))
    return image.convert(_ALPHA_MODES.get(image.mode, "RGB"))
