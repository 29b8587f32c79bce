"""The meaning of failed gRPC calls, for both clients."""

from __future__ import annotations

import os
import re
from typing import Any

import grpc

from imprompt._connection import EXPECTED, is_local
from imprompt._errors import (
    ConnectionFailed,
    ImpromptError,
    Overloaded,
    clipped,
    from_status,
    retry_hint,
)
from imprompt._request import Request
from imprompt._retry import Budget

CLOSED = "this client is closed; create a new one"
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
"""Environment variables from which gRPC takes a proxy."""


class StreamError(grpc.RpcError):  # type: ignore[misc]
    """A failed request, reported by the last message of its stream, in the form of a failed call."""

    def __init__(self, status: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self._status, self._message = status, message

    def code(self) -> grpc.StatusCode:
        return self._status

    def details(self) -> str:
        return self._message


def may_be_unreachable(error: Any) -> bool:
    """Whether `error` may mean that the server cannot be reached; a full server has the same status."""
    unavailable = error.code() is grpc.StatusCode.UNAVAILABLE and retry_hint(error.details() or "") is None
    return unavailable and not isinstance(error, StreamError)


def is_temporary(error: Any, failure: ImpromptError) -> bool:
    """Whether to resend the request: the server was full (`Overloaded`), or it vanished and may be restarting."""
    return isinstance(failure, Overloaded) or (isinstance(failure, ConnectionFailed) and may_be_unreachable(error))


def is_model_missing(error: Any) -> bool:
    """Whether the server does not know the model, or no longer does."""
    return error.code() is grpc.StatusCode.NOT_FOUND


def is_unreachable(error: Any) -> bool:
    """Whether a liveness probe failed to reach a server; any other status means that one responded."""
    return error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def to_exception(
    error: Any,
    address: str,
    request: Request | None,
    budget: Budget,
    *,
    reachable: bool,
    expected: bool,
) -> ImpromptError:
    """Build the exception for an `RpcError`.

    Args:
        request: the request that failed; None for a control call.
        reachable: whether a server responds at `address`.
        expected: whether the model should exist: it was served before, or the server is not ready yet.
    """
    status, message = error.code(), error.details() or ""
    request_id = None if request is None else request.id
    if status in _DEADLINE_STATUSES and budget.expired:
        return budget.deadline_error(request_id)
    if not reachable:
        reason = _reason(message, address)
        # A client that sends a request has reached a server at this address before.
        hint = f"; the address {EXPECTED}" if request is None else ""
        return ConnectionFailed(clipped(f"{address}: {reason}{hint}"), request_id=request_id)
    if request is None and status is grpc.StatusCode.DEADLINE_EXCEEDED:
        return ConnectionFailed(f"{address}: the server does not respond")
    if status is grpc.StatusCode.NOT_FOUND and expected:
        return Overloaded(clipped(message), request_id=request_id)  # Triton unloads models while it shuts down
    if status in _REFUSED_STATUSES:
        reason = clipped(f"{address}: the server refuses the call ({status.name}): {message or 'check the token'}")
        return ConnectionFailed(reason, request_id=request_id)
    return from_status(status, message, request_id=request_id)


_REFUSED_STATUSES = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
"""What a proxy in front of the server, such as Envoy, answers to a missing or wrong token."""
_DEADLINE_STATUSES = (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
"""How a call may end after its timeout: gRPC reports the first, a server that stops working the second."""

_CAUSE = re.compile(r"(?:last error: (?:[A-Z]+: )?(?:ipv[46]:\S+: )?|hostname lookup error:)(?P<cause>.+?)\]?$")


def _reason(message: str, address: str) -> str:
    """Say why the server cannot be reached, from the details of gRPC's error."""
    cause = _CAUSE.search(message)
    reason = f"cannot reach a gRPC server: {cause['cause'] if cause else message}"
    proxy = next((name for name in _PROXIES if os.environ.get(name)), None)
    if proxy is not None and not is_local(address):
        reason += f"; the call went through the proxy set in {proxy} (see no_proxy)"
    return reason
