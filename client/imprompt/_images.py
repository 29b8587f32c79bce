"""Encode pictures as the server expects them: bytes of a picture file."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
from PIL import Image, ImageSequence

from imprompt._errors import InvalidRequest, invalid, short_repr
from imprompt._picture_files import read_file


class SupportsDetach(Protocol):
    """A torch tensor."""

    def detach(self) -> Any:
        """Return the tensor without its gradient."""


ImageInput: TypeAlias = Image.Image | str | os.PathLike[str] | bytes | np.ndarray[Any, Any] | SupportsDetach
"""A PIL image; a path, a web address, or a data URI; the bytes of a file (PNG, JPEG, WebP, GIF, BMP, AVIF); an array
[height, width, 1, 3 or 4 channels], uint8 or float from 0 to 1; or such a torch tensor [channels, height, width]."""

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
"""Pillow modes that PNG supports directly."""
_CHANNELS = (1, 3, 4)
_ALPHA_MODES = {"La": "LA", "PA": "RGBA", "RGBa": "RGBA"}
# Speed over size: on a fast network, compressing takes longer than transferring. zlib's run-length strategy (Z_RLE) is
# both faster and smaller than its default at this level: after PNG's filters, pictures hold few longer matches.
_PNG_OPTIONS = {"compress_level": 1, "compress_type": zlib.Z_RLE}
_MAX_BMP_PIXELS = 512 * 512
"""Largest RGB picture to send without compression, in pixels. Writing and reading a PNG of that size takes 20 ms, which
is longer than a fast network needs for the difference."""

Encoder: TypeAlias = Callable[[object, str], bytes]


def encode(image: object, parameter: str) -> bytes:
    """Encode one picture: files and bytes pass through unchanged, anything else becomes a BMP or PNG without loss.

    Raises:
        InvalidRequest: `image` is not a picture, or its file cannot be read.
    """
    if isinstance(image, bytes | bytearray | memoryview | str | os.PathLike):
        return read_file(image, parameter)
    if isinstance(image, Image.Image):
        return _to_file(image, parameter)
    if hasattr(image, "__array__"):
        return _to_file(_from_array(_pixels(image, parameter), parameter), parameter)
    raise invalid(
        parameter,
        f"must be a PIL image, a path, a URL, encoded bytes, an array or a tensor, not {type(image).__name__}",
    )


def encode_mask(mask: object, parameter: str) -> bytes:
    """Encode one mask; arrays (uint8, bool, or floats from 0 to 1) become 8-bit grayscale pictures.

    Other pictures keep their mode: like diffusers, the server resizes masks before converting them to grayscale.
    """
    if isinstance(mask, Image.Image) and mask.mode == "F":
        mask = np.asarray(mask)
    if hasattr(mask, "__array__") and not isinstance(mask, Image.Image):
        values = _pixels(mask, parameter)
        if values.dtype == np.bool_:
            values = values.astype(np.uint8) * 255
        return _to_file(_from_array(values, parameter).convert("L"), parameter)
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
    """List the pictures in a picture, an array [pictures, ...] of them, or a list of either."""
    if isinstance(images, Sequence) and not isinstance(images, str | bytes | bytearray | memoryview):
        return [picture for entry in images for picture in _split(entry, parameter)]
    return _split(images, parameter)


def _split(image: object, parameter: str) -> list[object]:
    if isinstance(image, Image.Image) or not hasattr(image, "__array__"):
        return [image]
    array = _pixels(image, parameter)
    return list(array) if array.ndim == 4 else [array]


def as_frames(video: object, parameter: str) -> list[object]:
    """List the frames in an animated picture or its file; anything else is listed as by `as_list`."""
    if isinstance(video, str | os.PathLike | bytes | bytearray | memoryview):
        video = read_file(video, parameter)
    if not isinstance(video, Image.Image | bytes):
        return as_list(video, parameter)
    try:
        clip = Image.open(io.BytesIO(video)) if isinstance(video, bytes) else video
        if getattr(clip, "n_frames", 1) == 1:
            return [video]
        return [frame.convert("RGB") for frame in ImageSequence.Iterator(clip)]
    except Exception as error:  # whatever pillow raises for a damaged file
        raise invalid(parameter, f"the clip cannot be read: {error}") from None


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


def _pixels(values: Any, parameter: str) -> np.ndarray[Any, Any]:
    """Convert pictures to numpy, with channels last.

    Tensors have them first, as in diffusers' `VaeImageProcessor`, unless only the last axis can be channels.
    """
    array = to_numpy(values, parameter)
    if not hasattr(values, "detach") or array.ndim < 3:
        return array
    last = array.shape[-1] in _CHANNELS and array.shape[-3] not in _CHANNELS
    return array if last else np.moveaxis(array, -3, -1)


def decode(data: bytes) -> Image.Image:
    """Decode a picture sent by the server."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def _from_array(array: np.ndarray[Any, Any], parameter: str) -> Image.Image:
    shape = list(array.shape)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if not fits or not array.size or (array.dtype != np.uint8 and array.dtype.kind != "f"):
        expected = "uint8, or float from 0 to 1, [height, width, 1, 3 or 4 channels] (a tensor: channels first)"
        raise invalid(parameter, f"an array must be {expected}, not {array.dtype} {shape}")
    if array.dtype.kind == "f":
        if not ((array >= 0) & (array <= 1)).all():
            found = f"{array.min():g} to {array.max():g}"
            raise invalid(parameter, f"values of a float array must be 0 to 1, not {found}; rescale it")
        array = (array * 255).round().astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array))


def _to_file(image: Image.Image, parameter: str) -> bytes:
    """Write a small RGB picture as BMP, and any other as PNG."""
    if not image.width or not image.height:
        raise invalid(parameter, f"the picture has no pixels ({image.width}x{image.height})")
    buffer = io.BytesIO()
    try:
        image = _to_png_mode(image, parameter)
        small = image.width * image.height <= _MAX_BMP_PIXELS
        if small and image.mode == "RGB" and "transparency" not in image.info:
            image.save(buffer, "BMP")
        else:
            image.save(buffer, "PNG", **_PNG_OPTIONS)
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
