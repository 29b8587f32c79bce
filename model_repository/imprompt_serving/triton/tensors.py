"""Requests and responses of the Python backend as plain dictionaries of arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from imprompt_serving.drain import drain_deadline
from imprompt_serving.errors import InvalidRequest, Overloaded, RequestError

# The server adds its classes to the module only after it has imported the model, hence names here, not values.
_CODES = {
    "INVALID_ARGUMENT": "INVALID_ARG",
    "UNAVAILABLE": "UNAVAILABLE",
    "CANCELLED": "CANCELLED",
    "INTERNAL": "INTERNAL",
}


def arrays(request: Any) -> dict[str, np.ndarray]:
    """Inputs of a request (or outputs of a response) by name.

    Raises:
        InvalidRequest: the bytes of a tensor are not what its data type and shape say.
    """
    tensors = request.inputs() if hasattr(request, "inputs") else request.output_tensors()
    found = {}
    for tensor in tensors:
        try:
            found[tensor.name()] = tensor.as_numpy()
        except Exception as error:
            raise InvalidRequest(tensor.name(), f"cannot be read: {error}") from None
    return found


def to_tensors(values: Mapping[str, np.ndarray]) -> list[Any]:
    return [pb_utils.Tensor(name, np.ascontiguousarray(value)) for name, value in values.items()]


def response(values: Mapping[str, np.ndarray], request: Any = None) -> Any:
    """A response with ``values``, if given only those that ``request`` wants.

    Triton itself would drop the others without holding Python's lock, and could crash the process.
    """
    wanted = values if request is None else request.requested_output_names()
    return pb_utils.InferenceResponse(
        output_tensors=to_tensors({name: values[name] for name in values if name in wanted})
    )


def failure(error: RequestError) -> Any:
    code = getattr(pb_utils.TritonError, _CODES[error.status])
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code))


def send_final(sender: Any, answer: Any = None) -> None:
    """The last answer of a request, or just its end."""
    flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
    sender.send(flags=flags) if answer is None else sender.send(answer, flags=flags)


def raise_for_error(answer: Any) -> None:
    """Raise the error that an answer of another model carries.

    Raises:
        Overloaded: the server is stopping, when Triton refuses calls between models ("Server not ready").
        RequestError: anything else.
    """
    if answer.has_error():
        if drain_deadline() is not None:
            raise Overloaded("the server is stopping")
        raise RequestError(answer.error().message())


def texts(*values: str) -> np.ndarray:
    """A string tensor."""
    return np.array([value.encode() for value in values], dtype=object)
