"""Requests and responses of the Python backend as plain dictionaries of arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from imprompt_serving.errors import Cancelled, InvalidRequest, Overloaded, RequestError

_CODES = {
    "INVALID_ARGUMENT": pb_utils.TritonError.INVALID_ARG,
    "UNAVAILABLE": pb_utils.TritonError.UNAVAILABLE,
    "CANCELLED": pb_utils.TritonError.CANCELLED,
    "INTERNAL": pb_utils.TritonError.INTERNAL,
}
_ERRORS: dict[Any, type[RequestError]] = {
    pb_utils.TritonError.UNAVAILABLE: Overloaded,
    pb_utils.TritonError.CANCELLED: Cancelled,
}


def arrays(request: Any) -> dict[str, np.ndarray]:
    """Inputs of a request (or outputs of a response) by name."""
    tensors = request.inputs() if hasattr(request, "inputs") else request.output_tensors()
    return {tensor.name(): tensor.as_numpy() for tensor in tensors}


def to_tensors(values: Mapping[str, np.ndarray]) -> list[Any]:
    return [pb_utils.Tensor(name, np.ascontiguousarray(value)) for name, value in values.items()]


def response(values: Mapping[str, np.ndarray]) -> Any:
    return pb_utils.InferenceResponse(output_tensors=to_tensors(values))


def failure(error: RequestError) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), _CODES[error.status]))


def raise_for_error(answer: Any) -> None:
    """Raise the error that an answer of another model carries, with its status kept."""
    if not answer.has_error():
        return
    error = answer.error()
    if error.code() == pb_utils.TritonError.INVALID_ARG:
        parameter, _, problem = error.message().partition(": ")
        raise InvalidRequest(parameter, problem)
    raise _ERRORS.get(error.code(), RequestError)(error.message())


def text(value: str | bytes) -> np.ndarray:
    """A string tensor of one element."""
    return np.array([value.encode() if isinstance(value, str) else value], dtype=object)
