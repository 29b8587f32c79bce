"""A keyword's value -> an input tensor, in the data type and shape that the model has for it."""

from __future__ import annotations

import json
import math
import numbers
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from PIL import Image
from tritonclient.utils import serialize_byte_tensor, triton_to_np_dtype

from imprompt._errors import invalid
from imprompt._images import encode, encode_mask, listed, to_numpy
from imprompt._model import Input

_PICTURES = ("image", "mask_image", "control_image", "video")
"""Inputs whose texts are paths of picture files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """An input on the wire."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def encode_input(wanted: Input, value: object) -> Tensor:
    """A text or picture (or a list of them), a dict as JSON, a number, a list of numbers or an array.

    Raises:
        InvalidRequest: a value of another type or shape than the model takes.
    """
    if wanted.dtype == "BYTES":
        return _texts_or_pictures(wanted, value)
    if wanted.name == "seed":
        value = _signed(value)
    return numeric_tensor(wanted, value)


def _texts_or_pictures(wanted: Input, value: object) -> Tensor:
    if wanted.name in _PICTURES:
        encoder = encode_mask if wanted.name == "mask_image" else encode
        return bytes_tensor(wanted, [encoder(image, wanted.name) for image in listed(value)])
    if isinstance(value, Mapping):
        return bytes_tensor(wanted, [to_json(dict(value), wanted.name)])
    return bytes_tensor(wanted, [_text(item, wanted) for item in (value if is_list(value) else [value])])


def _text(value: object, wanted: Input) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, bytes):
        return value
    if isinstance(value, Image.Image | np.ndarray):
        return encode(value, wanted.name)
    many = " (or a list)" if wanted.dims == (-1,) else ""
    raise invalid(wanted.name, f"takes text{many}, got {type(value).__name__}")


def bytes_tensor(wanted: Input, values: list[bytes]) -> Tensor:
    """Texts or encoded pictures."""
    shape = _shape(wanted, (len(values),))
    data = serialize_byte_tensor(np.array(values, dtype=np.object_)).item() if values else b""
    return Tensor(name=wanted.name, dtype="BYTES", shape=shape, data=data)


def numeric_tensor(wanted: Input, value: object, *, parameter: str | None = None, label: str = "") -> Tensor:
    """A number, a list or an array, in the data type that the model has for it.

    Raises:
        InvalidRequest: for a value of another kind (no text for a number, no fraction for an integer), or shape.
    """
    parameter = parameter or wanted.name
    target: np.dtype[Any] = np.dtype(triton_to_np_dtype(wanted.dtype))
    kinds, what = _KINDS[target.kind]
    try:
        array = to_numpy(value)
    except (TypeError, ValueError):
        raise invalid(parameter, f"{label}takes {what}, got {reprlib.repr(value)}") from None
    if array.dtype.kind not in kinds and array.size:
        shown = f"an array of {array.dtype}" if array.ndim > 1 else reprlib.repr(value)
        raise invalid(parameter, f"{label}takes {what}, got {shown}")
    if target.kind in "iu" and array.size:
        limits = np.iinfo(target)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise invalid(parameter, f"{label}takes {limits.min} to {limits.max}, got {reprlib.repr(value)}")
    shape = _shape(wanted, array.shape or (1,), parameter=parameter, label=label)
    data = np.ascontiguousarray(array, dtype=target).tobytes()
    return Tensor(name=wanted.name, dtype=wanted.dtype, shape=shape, data=data)


_KINDS = {
    "f": ("fiu", "numbers"),
    "i": ("iu", "whole numbers"),
    "u": ("iu", "whole numbers"),
    "b": ("b", "true or false"),
}
"""By kind of the wanted data type: kinds of numpy arrays that it takes, and their name in messages."""


def _shape(wanted: Input, shape: tuple[int, ...], *, parameter: str | None = None, label: str = "") -> tuple[int, ...]:
    parameter = parameter or wanted.name
    if wanted.dims == (1,) and shape != (1,):
        raise invalid(parameter, f"{label}takes one value, got {math.prod(shape)}")
    if len(shape) != len(wanted.dims) or any(d not in (-1, s) for d, s in zip(wanted.dims, shape, strict=True)):
        dims = ", ".join("any" if size < 0 else str(size) for size in wanted.dims)
        raise invalid(parameter, f"{label}takes the shape [{dims}], got {list(shape)}")
    return shape


def _signed(seed: object) -> object:
    """`manual_seed` takes 64 bits, signed or not; the wire has them signed."""
    if is_list(seed):
        return [_signed(entry) for entry in seed]
    if not isinstance(seed, numbers.Integral) or isinstance(seed, bool):
        return seed
    if not -(2**63) <= int(seed) < 2**64:
        raise invalid("seed", f"takes -2**63 to 2**64 - 1, got {seed}")
    return int(seed) - 2**64 if int(seed) >= 2**63 else int(seed)


def to_json(value: object, parameter: str) -> bytes:
    """Plain JSON; values of numpy become Python's."""
    try:
        return json.dumps(value, allow_nan=False, default=_json_default).encode()
    except (TypeError, ValueError) as error:
        raise invalid(parameter, f"must be plain JSON values: {error}") from None


def _json_default(value: object) -> object:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is none")


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is one real number, of Python or numpy."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether it is a list or tuple."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)
