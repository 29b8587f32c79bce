"""Errors of a request, with the status they get on the wire."""

from __future__ import annotations

import re


class RequestError(Exception):
    """A request that ends without a picture; ``status`` names the gRPC status its caller sees."""

    status = "INTERNAL"


class InvalidRequest(RequestError):
    """A parameter is wrong. The message starts with its name and says what is allowed."""

    status = "INVALID_ARGUMENT"

    def __init__(self, parameter: str, problem: str) -> None:
        super().__init__(f"{parameter}: {problem}")
        self.parameter = parameter


class Overloaded(RequestError):
    """No room for this request now. ``reason``, a word, is for the metrics."""

    status = "UNAVAILABLE"

    def __init__(self, message: str, *, reason: str = "stopping") -> None:
        super().__init__(message)
        self.reason = reason


class Cancelled(RequestError):
    """The caller left, or its time is up."""

    status = "CANCELLED"


def from_status(status: str, message: str) -> RequestError:
    """The error that another model of the bundle reported."""
    if status == InvalidRequest.status:
        parameter, _, problem = message.partition(": ")
        return InvalidRequest(parameter, problem)
    return {Overloaded.status: Overloaded, Cancelled.status: Cancelled}.get(status, RequestError)(message)


_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def unexpected(error: Exception) -> RequestError:
    """The error that a caller sees for an exception that nobody foresaw; memory addresses are left out."""
    if isinstance(error, RequestError):
        return error
    return RequestError(_ADDRESS.sub("", f"{type(error).__name__}: {error}"))
