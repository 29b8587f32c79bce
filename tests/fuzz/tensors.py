"""Tensors as sent over the wire, both well-formed ones and mutated ones."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2

from fuzz.target import Model

NUMPY: dict[str, type] = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT64": np.uint64,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
}
"""Fixed-size KServe data types."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """One input of a request. `dtype`, `shape` and `data` need not be consistent; `data` None means no data at all."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | None

    def __str__(self) -> str:
        if self.data is None:
            return f"{self.dtype}{list(self.shape)[:8]} without data"
        start = self.data[4:] if self.dtype == "BYTES" and len(self.data) > 4 else self.data
        return f"{self.dtype}{list(self.shape)[:8]} of {len(self.data)} bytes {start[:80]!r}"


Tensors = dict[str, Tensor]


def tensor(dtype: str, values: Sequence[Any] | np.ndarray[Any, Any]) -> Tensor:
    """Build a well-formed tensor from a list (one axis) or an array."""
    if dtype == "BYTES":
        texts = [value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value for value in values]
        data = b"".join(struct.pack("<I", len(text)) + text for text in texts)
        return Tensor(dtype=dtype, shape=(len(texts),), data=data)
    with np.errstate(over="ignore"):  # 1e308 becomes infinity in FP32
        array: np.ndarray[Any, Any] = np.asarray(values, NUMPY[dtype])
    return Tensor(dtype=dtype, shape=array.shape, data=array.tobytes())


def tensors(model: Model, values: Mapping[str, Sequence[Any] | np.ndarray[Any, Any]]) -> Tensors:
    """Build tensors for values keyed by input name, in the data types that `model` declares."""
    declared = {declared.name: declared.dtype for declared in model.inputs}
    return {name: tensor(declared[name], value) for name, value in values.items()}


def message(model: str, inputs: Mapping[str, Tensor], *, request_id: str = "", outputs: Sequence[str] = ()) -> Any:
    """Build a `ModelInferRequest`."""
    request = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    for name, given in inputs.items():
        request.inputs.add(name=name, datatype=given.dtype, shape=given.shape)
        if given.data is not None:
            request.raw_input_contents.append(given.data)
    for name in outputs:
        request.outputs.add(name=name)
    return request
