"""Encode the value of a keyword as an input tensor, in the data type and shape that the model declares."""

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

from imprompt._errors import InvalidRequest, invalid, short_repr
from imprompt._images import as_frames, as_list, encode, encode_all, encode_mask, to_numpy
from imprompt._model import Input
from imprompt._parameters import NAMES, OBJECTS, PICTURES

_TEXTS = {*NAMES, "prompt", "encode_image"}
"""BYTES inputs that hold text, unless they are one of the above."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """An encoded input tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def encode_input(spec: Input, value: object) -> Tensor:
    """Encode the value of a parameter for the input of the same name.

    Raises:
        InvalidRequest: the value does not have the type or shape of the input.
    """
    if spec.dtype == "BYTES":
        return bytes_tensor(spec, _elements(spec, value))
    if spec.name == "seed":
        value = _signed(value)
    return numeric_tensor(spec, value)


def _elements(spec: Input, value: object) -> list[bytes]:
    name = spec.name
    if name in PICTURES:
        pictures = as_frames(value, name) if name == "video" else as_list(value, name)
        return encode_all(pictures, name, encode_mask if name == "mask_image" else encode)
    if name in OBJECTS:
        if not isinstance(value, Mapping):
            raise invalid(name, f"must be a dict, got {short_repr(value)}")
        return [to_json(value, name)]
    if name in _TEXTS:
        return _texts(spec, value)
    # The parameter is newer than this client, so its meaning is up to the server.
    if isinstance(value, Mapping):
        return [to_json(value, name)]
    return [
        item if isinstance(item, bytes) else encode(item, name) if _is_pixels(item) else _text(item, spec)
        for item in as_list(value, name)
    ]


def _is_pixels(value: object) -> bool:
    return isinstance(value, Image.Image | np.ndarray)


def _texts(spec: Input, value: object) -> list[bytes]:
    items = value if is_list(value) else [value]
    return [_text(item, spec, f" (item {n} of {len(items)})" * (len(items) > 1)) for n, item in enumerate(items, 1)]


def _text(value: object, spec: Input, which: str = "") -> bytes:
    if not isinstance(value, str):
        or_list = " or a list of strings" if spec.dims == (-1,) else ""
        raise invalid(spec.name, f"must be a string{or_list}, got {type(value).__name__}{which}")
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise invalid(spec.name, f"must be valid Unicode; {_surrogate(error)}{which}") from None


def _surrogate(error: UnicodeEncodeError) -> str:
    return f"character {error.start} ({error.object[error.start]!a}) is a lone surrogate"


def bytes_tensor(spec: Input, values: list[bytes]) -> Tensor:
    """Encode texts or picture files as a BYTES tensor."""
    shape = _shape(spec, (len(values),))
    data = serialize_byte_tensor(np.array(values, dtype=np.object_)).item() if values else b""
    return Tensor(name=spec.name, dtype="BYTES", shape=shape, data=data)


def numeric_tensor(spec: Input, value: object, *, parameter: str | None = None, label: str = "") -> Tensor:
    """Encode a number, a list or an array in the data type of the input.

    Raises:
        InvalidRequest: the value has the wrong kind (text for a number, a float for an integer) or shape.
    """
    parameter = parameter or spec.name
    target: np.dtype[Any] = np.dtype(triton_to_np_dtype(spec.dtype))
    kinds, one, many = _KINDS[target.kind]
    expected = f"{label}must be {one if spec.dims == (1,) else many}"
    try:
        if isinstance(value, Image.Image):
            raise invalid(parameter, "is a picture")
        array = to_numpy(value, parameter)
    except InvalidRequest:
        raise invalid(parameter, f"{expected}, got {short_repr(value)}") from None
    # numpy turns integers of more than 64 bits into objects, and bools among numbers into numbers.
    big = array.dtype == object and all(map(is_integer, array.ravel()))
    bools = target.kind != "b" and is_list(value) and any(isinstance(entry, bool | np.bool_) for entry in value)
    if array.size and (("i" if big else array.dtype.kind) not in kinds or bools):
        found = f"an array of {array.dtype}" if array.ndim > 1 else short_repr(value)
        raise invalid(parameter, f"{expected}, got {found}")
    if target.kind in "iu" and array.size:
        limits = np.iinfo(target)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise invalid(parameter, f"{label}must be {limits.min} to {limits.max}, got {short_repr(value)}")
    shape = _shape(spec, array.shape or (1,), parameter=parameter, label=label)
    try:
        with np.errstate(over="ignore"):  # a number too large for the data type becomes infinity, which servers refuse
            data = np.ascontiguousarray(array, dtype=target).tobytes()
    except OverflowError:
        raise invalid(parameter, f"{expected}, got {short_repr(value)}, which is too large") from None
    return Tensor(name=spec.name, dtype=spec.dtype, shape=shape, data=data)


_KINDS = {
    "f": ("fiu", "a number", "numbers"),
    "i": ("iu", "an integer", "integers"),
    "u": ("iu", "an integer", "integers"),
    "b": ("b", "True or False", "True or False"),
}
"""For each `dtype.kind` of an input: the kinds of arrays it accepts, and what messages call one value and several."""


def _shape(spec: Input, shape: tuple[int, ...], *, parameter: str | None = None, label: str = "") -> tuple[int, ...]:
    parameter = parameter or spec.name
    if spec.dims == (1,) and math.prod(shape) != 1:
        raise invalid(parameter, f"{label}must be a single value, got {math.prod(shape)}")
    if len(shape) != len(spec.dims) or any(d not in (-1, s) for d, s in zip(spec.dims, shape, strict=True)):
        dims = ", ".join("any" if size < 0 else str(size) for size in spec.dims)
        raise invalid(parameter, f"{label}must have shape [{dims}], got {list(shape)}")
    return shape


def _signed(seed: object) -> object:
    """Convert seeds to signed 64-bit integers, the data type of the input; `manual_seed` accepts unsigned ones too."""
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
        raise invalid("seed", f"must be -2**63 to 2**64 - 1, got {short_repr(seed)}")
    return int(seed) - 2**64 if seed >= 2**63 else int(seed)


def unsigned_seeds(seed: object) -> dict[int, int]:
    """Map the negative numbers sent for seeds of 2**63 and above back to those seeds."""
    given = to_numpy(seed, "seed").ravel().tolist() if hasattr(seed, "__array__") else seed
    entries = given if is_list(given) else [given]
    return {int(entry) - 2**64: int(entry) for entry in entries if is_integer(entry) and entry >= 2**63}


def to_json(value: object, parameter: str) -> bytes:
    """Encode JSON, with Python's `Infinity`; tuples and arrays become lists, and numpy values Python ones.

    Raises:
        InvalidRequest: the value has a part that JSON cannot represent faithfully.
    """
    try:
        return json.dumps(_plain(value, parameter), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise invalid(parameter, f"must contain only JSON values; {_surrogate(error)}") from None
    except RecursionError:
        raise invalid(parameter, "must contain only JSON values; these are nested too deeply") from None
    except ValueError as error:
        if isinstance(error, InvalidRequest):
            raise
        raise invalid(parameter, f"must contain only JSON values; {error}") from None  # an integer of too many digits


def _plain(value: object, parameter: str) -> object:
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise invalid(parameter, f"must contain only JSON values; the key {short_repr(key)} is not a string")
        return {str(key): _plain(entry, parameter) for key, entry in value.items()}
    if is_list(value):
        return [_plain(entry, parameter) for entry in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float) and not math.isnan(value):
        return float(value)
    raise invalid(parameter, f"must contain only JSON values, got {short_repr(value)}")


def is_integer(value: object) -> TypeGuard[int]:
    """Whether `value` is a Python or numpy integer (and not a bool)."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is a real Python or numpy number (and not a bool)."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether `value` is a sequence other than text or bytes."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)
