"""What can go wrong, as exceptions.

ImpromptError
├── InvalidRequest      (also ValueError)    a parameter is wrong; `parameter` names it
├── Overloaded                               no room now; `retry_after` says when to come back
├── DeadlineExceeded    (also TimeoutError)  `timeout` is over; work on the request stops
├── Cancelled                                the request was broken off, by the server or a proxy
├── ConnectionFailed    (also ConnectionError)  nobody answers at the address, or the connection broke
└── ServerError                              anything else that went wrong on the server
"""

from __future__ import annotations

import re
import reprlib
from typing import Any

import grpc


class ImpromptError(Exception):
    """Base of all errors of this package. `request_id` is the id of the request in the server's log, if it was sent."""

    def __init__(self, message: str, *, request_id: str | None = None) -> None:
        super().__init__(message)
        self.request_id = request_id


class InvalidRequest(ImpromptError, ValueError):
    """The request cannot be served as it is. Found before anything is sent, or by the server.

    `parameter` is the keyword to look at (None if the server did not name one); the message starts with it and says
    what is allowed.
    """

    def __init__(self, message: str, *, parameter: str | None = None, request_id: str | None = None) -> None:
        super().__init__(message, request_id=request_id)
        self.parameter = parameter


class Overloaded(ImpromptError):
    """The server has no room for the request, also after the client's own retries.

    `retry_after` is the server's estimate of when there will be, in seconds, or None.
    """

    def __init__(self, message: str, *, retry_after: float | None = None, request_id: str | None = None) -> None:
        super().__init__(message, request_id=request_id)
        self.retry_after = retry_after


class DeadlineExceeded(ImpromptError, TimeoutError):
    """The time that the caller gave is over."""


class Cancelled(ImpromptError):
    """The request was broken off by somebody else than its caller, such as a server that shuts down."""


class ConnectionFailed(ImpromptError, ConnectionError):
    """No server at the address, or the connection broke."""


class ServerError(ImpromptError):
    """The server failed; its log has the reason, under `request_id`."""


BY_STATUS: dict[grpc.StatusCode, type[ImpromptError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Overloaded,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
}
"""Exception of each gRPC status; `ServerError` for the others."""

MAX_MESSAGE = 1000
"""Characters of a message: a proxy or a log line has room for it."""
_NAMED_PARAMETER = re.compile(r"(?P<parameter>[a-z][a-z0-9_]*): ")
_TRITONS_PARAMETER = re.compile(r"\binput '(?P<parameter>[a-z][a-z0-9_]*)'")
_RETRY_HINT = re.compile(r"retry in (?P<seconds>\d+(\.\d+)?) s")
_TIME_IS_UP = re.compile(r"timeout: ")
_TRITONS_OWN = (
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
"""What Triton says of a request in a stream that no model has seen. It leaves out the status, so the text has to do."""
_GRPCS_LIMITS = re.compile(r"larger than max|metadata size exceeds")
"""gRPC reports its own limits by the status of a full server; sending the same again does not help."""


class _Shown(reprlib.Repr):
    """`repr` on one short line, without memory addresses, for whatever a caller passes."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 80

    def repr1(self, x: Any, level: int) -> str:
        try:
            text = super().repr1(x, level)
        except Exception:  # an integer of more digits than Python prints, a `__repr__` that fails
            return f"<{type(x).__name__}>"
        return f"<{type(x).__name__}>" if _ADDRESS.search(text) else " ".join(text.split())


_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
shown = _Shown().repr
"""`repr` of a caller's value, as messages show it."""


def clipped(text: str) -> str:
    """`text` as a message: of bounded length, fit to be printed, and without memory addresses."""
    text = _ADDRESS.sub("", text)
    text = text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE - 4]} ..."
    return text.encode(errors="backslashreplace").decode()


def invalid(parameter: str, problem: str) -> InvalidRequest:
    """An `InvalidRequest` found on this side of the wire."""
    return InvalidRequest(clipped(f"{parameter}: {problem}"), parameter=parameter)


def from_status(status: grpc.StatusCode, message: str, *, request_id: str | None = None) -> ImpromptError:
    """The exception for a request that ended with `status`, as the server's `message` tells it."""
    kind = BY_STATUS.get(status, ServerError)
    if kind is Cancelled and _TIME_IS_UP.match(message):
        kind = DeadlineExceeded
    elif status is grpc.StatusCode.RESOURCE_EXHAUSTED and _GRPCS_LIMITS.search(message):
        kind = ServerError
    message = clipped(message)
    if kind is InvalidRequest:
        named = _NAMED_PARAMETER.match(message) or _TRITONS_PARAMETER.search(message)
        return InvalidRequest(message, parameter=named and named["parameter"], request_id=request_id)
    if kind is Overloaded:
        return Overloaded(message, retry_after=retry_hint(message), request_id=request_id)
    return kind(message, request_id=request_id)


def status_of(message: str) -> grpc.StatusCode:
    """The status of an error of Triton's own that came without one."""
    return next((status for said, status in _TRITONS_OWN if said.search(message)), grpc.StatusCode.UNKNOWN)


def retry_hint(message: str) -> float | None:
    """Seconds after which a refusal says to come back (`... retry in 2.5 s`)."""
    hint = _RETRY_HINT.search(message)
    return float(hint["seconds"]) if hint else None
