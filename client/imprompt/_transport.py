"""What the two clients share of gRPC: how a channel is set up, and what a failed call means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import grpc

from imprompt._errors import ConnectionFailed, DeadlineExceeded, ImpromptError, from_status, invalid, retry_hint
from imprompt._request import Request
from imprompt._retry import Budget

Metadata = tuple[tuple[str, str], ...]

CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    # Pictures and clips are larger than gRPC's 4 MB.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # Finds dead connections below a long request. A server by default breaks a connection that pings more often than
    # every five minutes.
    ("grpc.keepalive_time_ms", 310_000),
    ("grpc.keepalive_timeout_ms", 20_000),
]
STREAM_METADATA: Metadata = (("triton_grpc_error", "true"),)
"""Makes Triton end a stream with the gRPC status of an error, instead of its text alone."""


def check_url(url: str) -> str:
    """`host:port` of a gRPC endpoint."""
    address = url.removeprefix("grpc://")
    if "://" in address:
        raise invalid("url", f"the gRPC address of the server as host:port, such as localhost:8001; got {url!r}")
    return address


def as_metadata(metadata: Mapping[str, str] | Sequence[tuple[str, str]] | None) -> Metadata:
    pairs = metadata.items() if isinstance(metadata, Mapping) else metadata or ()
    return tuple((name.lower(), value) for name, value in pairs)


def may_be_unreachable(error: Any) -> bool:
    """Whether `error` may mean that nobody is there: gRPC and a full server use one status for it."""
    return error.code() is grpc.StatusCode.UNAVAILABLE and retry_hint(error.details() or "") is None


def means_nobody_there(error: Any) -> bool:
    """The same for the question whether somebody is: any other status is a sign of life."""
    return error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def failure(error: Any, address: str, request: Request | None, budget: Budget, *, reachable: bool) -> ImpromptError:
    """The exception for an `RpcError`.

    Args:
        request: what was asked for, unless it was a small question.
        reachable: whether a server answers at `address`.
    """
    status, message = error.code(), error.details() or ""
    request_id = None if request is None else request.id
    if not reachable:
        return ConnectionFailed(f"{address}: {message}", request_id=request_id)
    if status in _TIME_IS_UP and budget.late:
        return DeadlineExceeded(f"timeout: {budget.timeout:g} seconds are over", request_id=request_id)
    return from_status(status, message, request_id=request_id)


_TIME_IS_UP = (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
"""What a call may end with when its caller's time is over: gRPC says the one, a server that stops work the other."""
