"""A keyword's value -> an input tensor, in the data type and shape that the model has for it."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from PIL import Image
from tritonclient.utils import serialize_byte_tensor, triton_to_np_dtype

from imprompt._errors import InvalidRequest, invalid, shown
from imprompt._images import encode, encode_all, encode_mask, listed, to_numpy
from imprompt._model import Input
from imprompt._parameters import NAMES

PICTURES = ("image", "mask_image", "control_image", "video")
"""Inputs whose texts are paths of picture files."""
_CONFIGURATIONS = ("scheduler_config",)
_TEXTS = {*NAMES, "prompt", "encode_image"}
"""Inputs of bytes that are texts, when they are neither of these."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """An input on the wire."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def encode_input(wanted: Input, value: object) -> Tensor:
    """The value of a parameter, as the input of its name takes it.

    Raises:
        InvalidRequest: a value of another type or shape than the model takes.
    """
    if wanted.dtype == "BYTES":
        return bytes_tensor(wanted, _elements(wanted, value))
    if wanted.name == "seed":
        value = _signed(value)
    return numeric_tensor(wanted, value)


def _elements(wanted: Input, value: object) -> list[bytes]:
    name = wanted.name
    if name in PICTURES:
        return encode_all(listed(value, name), name, encode_mask if name == "mask_image" else encode)
    if name in _CONFIGURATIONS:
        if not isinstance(value, Mapping):
            raise invalid(name, f"takes a dict, got {shown(value)}")
        return [to_json(value, name)]
    if name in _TEXTS:
        return _texts(wanted, value)
    # A parameter that is newer than this client; the server knows what it is.
    if isinstance(value, Mapping):
        return [to_json(value, name)]
    return [
        item if isinstance(item, bytes) else encode(item, name) if _is_pixels(item) else _text(item, wanted)
        for item in listed(value, name)
    ]


def _is_pixels(value: object) -> bool:
    return isinstance(value, Image.Image | np.ndarray)


def _texts(wanted: Input, value: object) -> list[bytes]:
    items = value if is_list(value) else [value]
    return [_text(item, wanted, f" (item {n} of {len(items)})" * (len(items) > 1)) for n, item in enumerate(items, 1)]


def _text(value: object, wanted: Input, which: str = "") -> bytes:
    if not isinstance(value, str):
        many = " (or a list)" if wanted.dims == (-1,) else ""
        raise invalid(wanted.name, f"takes text{many}, got {type(value).__name__}{which}")
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise invalid(wanted.name, f"takes text; {_surrogate(error)}{which}") from None


def _surrogate(error: UnicodeEncodeError) -> str:
    return f"character {error.start} ({error.object[error.start]!a}) is half of one: a lone surrogate"


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
        array = to_numpy(value, parameter)
    except InvalidRequest:
        raise invalid(parameter, f"{label}takes {what}, got {shown(value)}") from None
    # Integers of more than 64 bits are objects to numpy, and flags among numbers become numbers.
    long = array.dtype == object and array.size > 0 and all(map(is_integer, array.ravel()))
    flags = target.kind != "b" and is_list(value) and any(isinstance(entry, bool | np.bool_) for entry in value)
    if array.size and (("i" if long else array.dtype.kind) not in kinds or flags):
        found = f"an array of {array.dtype}" if array.ndim > 1 else shown(value)
        raise invalid(parameter, f"{label}takes {what}, got {found}")
    if target.kind in "iu" and array.size:
        limits = np.iinfo(target)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise invalid(parameter, f"{label}takes {limits.min} to {limits.max}, got {shown(value)}")
    shape = _shape(wanted, array.shape or (1,), parameter=parameter, label=label)
    try:
        with np.errstate(over="ignore"):  # a large number that the model's type has as infinity; the server refuses it
            data = np.ascontiguousarray(array, dtype=target).tobytes()
    except OverflowError:
        raise invalid(parameter, f"{label}takes {what}, got {shown(value)}, which is too large") from None
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
    if wanted.dims == (1,) and math.prod(shape) != 1:
        raise invalid(parameter, f"{label}takes one value, got {math.prod(shape)}")
    if len(shape) != len(wanted.dims) or any(d not in (-1, s) for d, s in zip(wanted.dims, shape, strict=True)):
        dims = ", ".join("any" if size < 0 else str(size) for size in wanted.dims)
        raise invalid(parameter, f"{label}takes the shape [{dims}], got {list(shape)}")
    return shape


def _signed(seed: object) -> object:
    """`manual_seed` takes 64 bits, signed or not; the wire has them signed."""
    if hasattr(seed, "__array__"):
        array = to_numpy(seed, "seed")
        seed = array.tolist() if array.ndim < 2 else array
    if is_list(seed):
        return [_signed_seed(entry) for entry in seed]
    return _signed_seed(seed)


def _signed_seed(seed: object) -> object:
    if not is_integer(seed):
        return seed
    if not -(2**63) <= seed < 2**64:
        raise invalid("seed", f"takes -2**63 to 2**64 - 1, got {shown(seed)}")
    return int(seed) - 2**64 if seed >= 2**63 else int(seed)


def unsigned_seeds(seed: object) -> dict[int, int]:
    """Those of the seeds that the wire has as negative numbers, by these."""
    given = to_numpy(seed, "seed").ravel().tolist() if hasattr(seed, "__array__") else seed
    entries = given if is_list(given) else [given]
    return {int(entry) - 2**64: int(entry) for entry in entries if is_integer(entry) and entry >= 2**63}


def to_json(value: object, parameter: str) -> bytes:
    """JSON with Python's `Infinity`; tuples and arrays become lists, and numpy's values Python's.

    Raises:
        InvalidRequest: something that JSON cannot hold, or not as what it is.
    """
    try:
        return json.dumps(_plain(value, parameter), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise invalid(parameter, f"must be plain JSON values: {_surrogate(error)}") from None
    except RecursionError:
        raise invalid(parameter, "must be plain JSON values: these are nested too deep") from None
    except ValueError as error:
        if isinstance(error, InvalidRequest):
            raise
        raise invalid(parameter, f"must be plain JSON values: {error}") from None  # an integer of thousands of digits


def _plain(value: object, parameter: str) -> object:
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise invalid(parameter, f"must be plain JSON values: the key {shown(key)} is not text")
        return {str(key): _plain(entry, parameter) for key, entry in value.items()}
    if is_list(value):
        return [_plain(entry, parameter) for entry in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float) and not math.isnan(value):
        return float(value)
    raise invalid(parameter, f"must be plain JSON values: {shown(value)} is none")


def is_integer(value: object) -> TypeGuard[int]:
    """Whether it is one whole number, of Python or numpy."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is one real number, of Python or numpy."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether it is a list or tuple."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)
