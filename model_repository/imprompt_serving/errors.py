"""Errors of a request, with the status they get on the wire."""

from __future__ import annotations

import re
import reprlib

MAX_MESSAGE_BYTES = 1024
"""gRPC sends a status message as HTTP headers, and a client drops the whole answer if they exceed 8 KB."""
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_CUT = " [...]"
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80


class RequestError(Exception):
    """A request that ends without a picture; ``status`` names the gRPC status its caller sees.

    The message is at most `MAX_MESSAGE_BYTES` long and safe to print and to encode, whatever it quotes.
    """

    status = "INTERNAL"

    def __init__(self, message: str) -> None:
        super().__init__(_printable(message))


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


def unexpected(error: Exception) -> RequestError:
    """The error that a caller sees for an exception that nobody foresaw."""
    return error if isinstance(error, RequestError) else RequestError(f"{type(error).__name__}: {error}")


def shown(value: object) -> str:
    """`value` as a message quotes it: its `repr`, shortened."""
    try:
        return _REPR.repr(value)
    except Exception:  # such as an integer with too many digits for `str`
        return f"<{type(value).__name__}>"


def _printable(message: str) -> str:
    """`message` on one line, without memory addresses and within `MAX_MESSAGE_BYTES` of UTF-8."""
    # Longer texts are cut before they are cleaned: no character takes more than four bytes.
    text = "".join(_escaped(character) for character in _ADDRESS.sub("", message[: 2 * MAX_MESSAGE_BYTES]))
    if len(text.encode()) <= MAX_MESSAGE_BYTES:
        return text
    room = MAX_MESSAGE_BYTES - len(_CUT)
    return text.encode()[:room].decode(errors="ignore") + _CUT


def _escaped(character: str) -> str:
    """Lone surrogates cannot be encoded, and control characters break logs and gRPC's headers."""
    if character in "\n\t":
        return " "
    return character if character.isprintable() else character.encode("unicode_escape").decode()
