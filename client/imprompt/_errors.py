"""The exception hierarchy.

ImpromptError
├── InvalidRequest    (also ValueError)       a parameter is invalid; `parameter` names it
├── Overloaded                                the server is full; `retry_after` says when to try again
├── DeadlineExceeded  (also TimeoutError)     `timeout` has passed; the server stops working on the request
├── Cancelled                                 the server or a proxy aborted the request
├── ConnectionFailed  (also ConnectionError)  the server cannot be reached, or the connection broke
└── ServerError                               any other failure on the server
"""

from __future__ import annotations

import re
import reprlib
from typing import Any

import grpc


class ImpromptError(Exception):
    """Base class of this package's exceptions. `request_id` identifies a sent request in the server's log."""

    def __init__(self, message: str, *, request_id: str | None = None) -> None:
        super().__init__(message)
        self.request_id = request_id


class InvalidRequest(ImpromptError, ValueError):
    """The request is invalid. Raised by the client before anything is sent, or by the server.

    `parameter` is the keyword at fault (None if the server did not name one). The message starts with it and says what
    is allowed.
    """

    def __init__(self, message: str, *, parameter: str | None = None, request_id: str | None = None) -> None:
        super().__init__(message, request_id=request_id)
        self.parameter = parameter


class Overloaded(ImpromptError):
    """The server is full, even after the client's retries.

    `retry_after` is the server's estimate, in seconds, of when it will accept the request; None if unknown.
    """

    def __init__(self, message: str, *, retry_after: float | None = None, request_id: str | None = None) -> None:
        super().__init__(message, request_id=request_id)
        self.retry_after = retry_after


class DeadlineExceeded(ImpromptError, TimeoutError):
    """The request's `timeout` has passed."""


class Cancelled(ImpromptError):
    """The request was aborted by someone other than the caller, such as a server shutting down."""


class ConnectionFailed(ImpromptError, ConnectionError):
    """The server cannot be reached, or the connection broke."""


class ServerError(ImpromptError):
    """The server failed; its log has the reason under `request_id`."""


BY_STATUS: dict[grpc.StatusCode, type[ImpromptError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Overloaded,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
}
"""The exception for each gRPC status; all others become `ServerError`."""

MAX_MESSAGE = 1000
"""Maximum length in characters, which fits a proxy's limits and a log line."""
_NAMED_PARAMETER = re.compile(r"(?P<parameter>[a-z][a-z0-9_]*): ")
_TRITON_INPUT = re.compile(r"\binput '(?P<parameter>[a-z][a-z0-9_]*)'")
_RETRY_HINT = re.compile(r"retry in (?P<seconds>\d+(\.\d+)?) s")
_DEADLINE_MESSAGE = re.compile(r"timeout: ")
_TRITON_ERRORS = (
    (re.compile(r"unknown model"), grpc.StatusCode.NOT_FOUND),
    (
        re.compile(
            r"not ready|no available versions|stopped accepting|maximum queue size|server is (stopping|exiting)"
        ),
        grpc.StatusCode.UNAVAILABLE,
    ),
    (
        re.compile(r"inference (in|out)put|for input '|number of inputs|input '.*' already exists|specified version"),
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
)
"""Errors that Triton itself raises in a stream, before any model runs. They carry no status, only this text."""
_DEAD_MODEL = re.compile(r"^(Failed to process the request|Stub process).* is not healthy")
"""What Triton says until `imprompt serve` restarts it, because the process of a model has died."""
_GRPC_LIMIT = re.compile(r"larger than max|metadata size exceeds")
"""gRPC's own size limits: they have the same status as a full server, but a retry cannot succeed."""


class _ShortRepr(reprlib.Repr):
    """A `repr` that fits on one short line, has no memory addresses, and works for any object."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 80

    def repr1(self, x: Any, level: int) -> str:
        try:
            text = super().repr1(x, level)
        except Exception:  # an integer with more digits than Python prints, or a broken `__repr__`
            return f"<{type(x).__name__}>"
        return f"<{type(x).__name__}>" if _ADDRESS.search(text) else " ".join(text.split())


_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
short_repr = _ShortRepr().repr
"""`repr` of a caller's value, for use in messages."""


def clipped(text: str) -> str:
    """Make `text` fit for a message: bounded in length, printable, and without memory addresses."""
    text = _ADDRESS.sub("", text)
    text = text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE - 4]} ..."
    return text.encode(errors="backslashreplace").decode()


def invalid(parameter: str, problem: str) -> InvalidRequest:
    """Build an `InvalidRequest` whose message starts with the parameter."""
    return InvalidRequest(clipped(f"{parameter}: {problem}"), parameter=parameter)


def from_status(status: grpc.StatusCode, message: str, *, request_id: str | None = None) -> ImpromptError:
    """Build the exception for a request that ended with this gRPC status and message."""
    if _DEAD_MODEL.search(message):
        status = grpc.StatusCode.UNAVAILABLE
    kind = BY_STATUS.get(status, ServerError)
    if kind is Cancelled and _DEADLINE_MESSAGE.match(message):
        kind = DeadlineExceeded
    elif status is grpc.StatusCode.RESOURCE_EXHAUSTED and _GRPC_LIMIT.search(message):
        kind = ServerError
    message = clipped(message)
    if kind is InvalidRequest:
        named = _NAMED_PARAMETER.match(message) or _TRITON_INPUT.search(message)
        return InvalidRequest(message, parameter=named and named["parameter"], request_id=request_id)
    if kind is Overloaded:
        return Overloaded(message, retry_after=retry_hint(message), request_id=request_id)
    return kind(message, request_id=request_id)


def triton_status(message: str) -> grpc.StatusCode:
    """Infer the status of an error that Triton itself raised in a stream, from its text."""
    return next((status for text, status in _TRITON_ERRORS if text.search(message)), grpc.StatusCode.UNKNOWN)


def retry_hint(message: str) -> float | None:
    """Return the seconds that a refusal asks to wait (`... retry in 2.5 s`), or None."""
    hint = _RETRY_HINT.search(message)
    return float(hint["seconds"]) if hint else None
