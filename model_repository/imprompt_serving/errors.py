"""Errors that end a request, each with its gRPC status."""

from __future__ import annotations

import re
import reprlib

MAX_MESSAGE_BYTES = 1024
"""gRPC sends a status message in HTTP headers, and clients drop the whole response if these exceed 8 KB."""
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_CUT = " [...]"
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80


class RequestError(Exception):
    """A request failed. `status` is the gRPC status that the caller sees.

    `name` is for logs: the Python client's name for the error, or the type of an unexpected exception. The message has
    at most `MAX_MESSAGE_BYTES` and is safe to print and encode, whatever it quotes.
    """

    status = "INTERNAL"
    name = "ServerError"

    def __init__(self, message: str) -> None:
        super().__init__(_printable(message))

    @property
    def label(self) -> str:
        """Status and name, for `from_label` in another model of the bundle."""
        return f"{self.status} {self.name}"


class InvalidRequest(RequestError):
    """A parameter is invalid. The message starts with its name and says what is allowed."""

    status = "INVALID_ARGUMENT"
    name = "InvalidRequest"

    def __init__(self, parameter: str, problem: str) -> None:
        super().__init__(f"{parameter}: {problem}")
        self.parameter = parameter


class Overloaded(RequestError):
    """The server cannot take the request now. `reason` is a single word for the metrics."""

    status = "UNAVAILABLE"
    name = "Overloaded"

    def __init__(self, message: str, *, reason: str = "stopping") -> None:
        super().__init__(message)
        self.reason = reason


class Cancelled(RequestError):
    """The caller canceled the request, or its timeout expired."""

    status = "CANCELLED"
    name = "Cancelled"


class DeadlineExceeded(Cancelled):
    """The timeout of the request, in seconds, has expired."""

    name = "DeadlineExceeded"

    def __init__(self, timeout: float) -> None:
        super().__init__(f"timeout: {timeout:g} seconds have passed")


def from_label(label: str, message: str) -> RequestError:
    """Rebuild the error that another model of the bundle reported, from its `label` and message."""
    status, _, name = label.partition(" ")
    if status == InvalidRequest.status:
        parameter, _, problem = message.partition(": ")
        return InvalidRequest(parameter, problem)
    error = {Overloaded.status: Overloaded, Cancelled.status: Cancelled}.get(status, RequestError)(message)
    error.name = name or error.name
    return error


def unexpected(error: Exception) -> RequestError:
    """Turn any exception into an error to send to the caller: itself if it is one, otherwise INTERNAL."""
    if isinstance(error, RequestError):
        return error
    failure = RequestError(f"{type(error).__name__}: {error}")
    failure.name = type(error).__name__
    return failure


def shown(value: object) -> str:
    """Quote `value` in a message: its `repr`, shortened."""
    try:
        return _REPR.repr(value)
    except Exception:  # for example, an integer with too many digits for `str`
        return f"<{type(value).__name__}>"


def _printable(message: str) -> str:
    """Return `message` on one line, without memory addresses, and cut to `MAX_MESSAGE_BYTES` of UTF-8."""
    # Cut long texts before cleaning them, to bound the work.
    text = "".join(_escaped(character) for character in _ADDRESS.sub("", message[: 2 * MAX_MESSAGE_BYTES]))
    if len(text.encode()) <= MAX_MESSAGE_BYTES:
        return text
    room = MAX_MESSAGE_BYTES - len(_CUT)
    return text.encode()[:room].decode(errors="ignore") + _CUT


def _escaped(character: str) -> str:
    """Escape lone surrogates, which cannot be encoded, and control characters, which break logs and gRPC headers."""
    if character in "\n\t":
        return " "
    return character if character.isprintable() else character.encode("unicode_escape").decode()
