"""gRPC code shared by both clients: channel setup, and the meaning of failed calls."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from typing import Any

import grpc

from imprompt._errors import (
    ConnectionFailed,
    ImpromptError,
    Overloaded,
    clipped,
    from_status,
    invalid,
    retry_hint,
    short_repr,
)
from imprompt._request import Request
from imprompt._retry import Budget

CLOSED = "this client is closed; create a new one"
Metadata = tuple[tuple[str, str], ...]

DEFAULT_PORT = 8001
_EXPECTED = "must be the host:port of the server's gRPC endpoint, such as localhost:8001"
_ADDRESS = re.compile(r"(?P<host>[\w.-]+|\[[0-9a-fA-F:.]+\])(:(?P<port>[0-9]{1,5}))?")
_SOCKET = "unix:"
_SHORT_IP = re.compile(r"[\d.]+")
"""Abbreviated addresses such as 127.1, which resolvers read as 127.0.0.1."""
_LOOPBACK_NAMES = ("localhost", "localhost.localdomain", "localhost4", "localhost6", "ip6-localhost", "ip6-loopback")
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


def check_url(url: object) -> str:
    """Normalize the address of a gRPC endpoint to `host:port`; the default port is 8001.

    Raises:
        InvalidRequest: `url` is something else, such as a web address.
    """
    if not isinstance(url, str):
        raise invalid("url", f"{_EXPECTED}; got {short_repr(url)}")
    address = url.strip().removeprefix("grpc://")
    if "://" in address:
        raise invalid("url", f"{_EXPECTED}, without http:// (port 8000 is HTTP, 8002 metrics); got {short_repr(url)}")
    if address.startswith(_SOCKET) and address.isprintable():
        return address
    if _ip(address) is not None and ":" in address:
        address = f"[{address}]"
    parts = _ADDRESS.fullmatch(address)
    if parts is None or (parts["port"] is not None and not 0 < int(parts["port"]) < 2**16):
        raise invalid("url", f"{_EXPECTED}; got {short_repr(url)}")
    return address if parts["port"] else f"{address}:{DEFAULT_PORT}"


def check_credentials(credentials: object) -> None:
    """Raise `InvalidRequest` for anything but `ChannelCredentials`; gRPC itself would fail much later."""
    if credentials is not None and not isinstance(credentials, grpc.ChannelCredentials):
        raise invalid(
            "credentials",
            f"must be ChannelCredentials, such as grpc.ssl_channel_credentials(); got {short_repr(credentials)}",
        )


def channel_options(address: str) -> list[tuple[str, Any]]:
    """Return the gRPC options for a channel to `address`."""
    return [
        # Pictures and clips exceed gRPC's default limit of 4 MB.
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", -1),
        # Error messages travel in a header. If it exceeds the default limit of 8 KB, gRPC reports a different error.
        ("grpc.max_metadata_size", 64 * 1024),
        # Detect dead connections during long requests. By default, servers drop clients that ping more often than every
        # five minutes.
        ("grpc.keepalive_time_ms", 310_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        # A proxy cannot reach this machine under a loopback name.
        ("grpc.enable_http_proxy", int(not _is_local(address))),
    ]


def _is_local(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]").rstrip(".").lower()
    ip = _ip(host)
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if ip is not None:
        return ip.is_loopback or ip.is_unspecified
    return address.startswith(_SOCKET) or host in _LOOPBACK_NAMES or host.endswith(".localhost")


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(socket.inet_aton(host) if _SHORT_IP.fullmatch(host) else host)
    except (OSError, ValueError):
        return None


_NAME = re.compile(r"[a-z0-9_.-]+")
_VALUE = re.compile(r"[ -~]*")


def check_metadata(metadata: object) -> Metadata:
    """Convert metadata to the form that gRPC takes.

    Raises:
        InvalidRequest: a name or value cannot be sent in a header.
    """
    expected = "must map header names to values, all printable ASCII, such as {'authorization': 'Bearer ...'}"
    pairs = metadata.items() if isinstance(metadata, Mapping) else metadata or ()
    if isinstance(pairs, str | bytes) or not hasattr(pairs, "__iter__"):
        raise invalid("metadata", expected)
    headers = []
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise invalid("metadata", expected)  # never show the pair: its value may be a secret
        name, value = pair[0].lower(), pair[1]
        if not _NAME.fullmatch(name) or name.endswith("-bin") or not _VALUE.fullmatch(value):
            raise invalid("metadata", f"{expected}; got {short_repr(name)}")
        headers.append((name, value))
    return tuple(headers)


def may_be_unreachable(error: Any) -> bool:
    """Whether `error` may mean that the server cannot be reached; a full server has the same status."""
    unavailable = error.code() is grpc.StatusCode.UNAVAILABLE and retry_hint(error.details() or "") is None
    return unavailable and not isinstance(error, StreamError)


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
        hint = f"; the address {_EXPECTED}" if request is None else ""
        return ConnectionFailed(clipped(f"{address}: {reason}{hint}"), request_id=request_id)
    if request is None and status is grpc.StatusCode.DEADLINE_EXCEEDED:
        return ConnectionFailed(f"{address}: the server does not respond")
    if status is grpc.StatusCode.NOT_FOUND and expected:
        return Overloaded(clipped(message), request_id=request_id)  # Triton unloads models while it shuts down
    return from_status(status, message, request_id=request_id)


_DEADLINE_STATUSES = (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
"""How a call may end after its timeout: gRPC reports the first, a server that stops working the second."""

_CAUSE = re.compile(r"(?:last error: (?:[A-Z]+: )?(?:ipv[46]:\S+: )?|hostname lookup error:)(?P<cause>.+?)\]?$")


def _reason(message: str, address: str) -> str:
    """Say why the server cannot be reached, from the details of gRPC's error."""
    cause = _CAUSE.search(message)
    reason = f"cannot reach a gRPC server: {cause['cause'] if cause else message}"
    proxy = next((name for name in _PROXIES if os.environ.get(name)), None)
    if proxy is not None and not _is_local(address):
        reason += f"; the call went through the proxy set in {proxy} (see no_proxy)"
    return reason
