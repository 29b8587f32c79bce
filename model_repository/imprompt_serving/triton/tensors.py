"""Convert requests and responses of the Python backend to and from dictionaries of arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from imprompt_serving.drain import drain_deadline
from imprompt_serving.errors import InvalidRequest, Overloaded, RequestError

# Names instead of values: the server adds its classes to the module only after importing the model.
_CODES = {
    "INVALID_ARGUMENT": "INVALID_ARG",
    "UNAVAILABLE": "UNAVAILABLE",
    "CANCELLED": "CANCELLED",
    "INTERNAL": "INTERNAL",
}

_DEAD_MODEL = "is not healthy"
"""Part of Triton's message for calls of a model whose process has died."""


def arrays(request: Any) -> dict[str, np.ndarray]:
    """Return the inputs of a request (or outputs of a response) by name.

    Raises:
        InvalidRequest: the bytes of a tensor do not match its data type and shape.
    """
    tensors = request.inputs() if hasattr(request, "inputs") else request.output_tensors()
    values = {}
    for tensor in tensors:
        try:
            values[tensor.name()] = tensor.as_numpy()
        except Exception as error:
            raise InvalidRequest(tensor.name(), f"cannot be read: {error}") from None
    return values


def to_tensors(values: Mapping[str, np.ndarray]) -> list[Any]:
    """Convert arrays to Triton tensors."""
    return [pb_utils.Tensor(name, np.ascontiguousarray(value)) for name, value in values.items()]


def response(values: Mapping[str, np.ndarray], request: Any = None) -> Any:
    """Make a response with `values`; with `request`, only those that it asks for.

    Otherwise Triton would drop the others itself, without holding the GIL, and could crash the process.
    """
    requested = values if request is None else request.requested_output_names()
    return pb_utils.InferenceResponse(
        output_tensors=to_tensors({name: values[name] for name in values if name in requested})
    )


def failure(error: RequestError) -> Any:
    """Make an error response with the status of `error`."""
    code = getattr(pb_utils.TritonError, _CODES[error.status])
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code))


def send_final(sender: Any, answer: Any = None) -> None:
    """Send the final response, or only the end of the responses."""
    flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
    sender.send(flags=flags) if answer is None else sender.send(answer, flags=flags)


def raise_for_error(answer: Any) -> None:
    """Raise the error in a response of another model.

    Raises:
        Overloaded: the server is stopping (Triton then refuses calls between models), or it is about
            to be restarted because the called model has died.
        RequestError: any other error.
    """
    if answer.has_error():
        message = answer.error().message()
        if drain_deadline() is not None:
            raise Overloaded("the server is stopping")
        if _DEAD_MODEL in message:
            raise Overloaded("a model process has died, and the server is about to restart")
        raise RequestError(message)


def texts(*values: str) -> np.ndarray:
    """Make a string tensor."""
    return np.array([value.encode() for value in values], dtype=object)
