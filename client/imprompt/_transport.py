"""What the two clients share of gRPC: how a channel is set up, and what a failed call means."""

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
    shown,
)
from imprompt._request import Request
from imprompt._retry import Budget

CLOSED = "this client is closed; make another"
Metadata = tuple[tuple[str, str], ...]

DEFAULT_PORT = 8001
_WANTED = "host:port of the server's gRPC endpoint, such as localhost:8001"
_ADDRESS = re.compile(r"(?P<host>[\w.-]+|\[[0-9a-fA-F:.]+\])(:(?P<port>[0-9]{1,5}))?")
_SOCKET = "unix:"
_SHORT_IP = re.compile(r"[\d.]+")
"""Such as 127.1, which resolvers take for 127.0.0.1."""
_LOOPBACK_NAMES = ("localhost", "localhost.localdomain", "localhost4", "localhost6", "ip6-localhost", "ip6-loopback")
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
"""Environment variables that gRPC reads."""


class StreamError(grpc.RpcError):  # type: ignore[misc]
    """The failure of a request that the last answer of its stream reports, in the form of a failed call."""

    def __init__(self, status: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self._status, self._message = status, message

    def code(self) -> grpc.StatusCode:
        return self._status

    def details(self) -> str:
        return self._message


def check_url(url: object) -> str:
    """`host:port` of a gRPC endpoint; the port is 8001 unless `url` names one.

    Raises:
        InvalidRequest: anything else, such as a web address.
    """
    if not isinstance(url, str):
        raise invalid("url", f"{_WANTED}; got {shown(url)}")
    address = url.strip().removeprefix("grpc://")
    if "://" in address:
        raise invalid("url", f"{_WANTED}, without http:// (port 8000 is HTTP, 8002 metrics); got {shown(url)}")
    if address.startswith(_SOCKET) and address.isprintable():
        return address
    if _ip(address) is not None and ":" in address:
        address = f"[{address}]"
    parts = _ADDRESS.fullmatch(address)
    if parts is None or (parts["port"] is not None and not 0 < int(parts["port"]) < 2**16):
        raise invalid("url", f"{_WANTED}; got {shown(url)}")
    return address if parts["port"] else f"{address}:{DEFAULT_PORT}"


def check_credentials(credentials: object) -> None:
    """Refuse what is no `ChannelCredentials`, which gRPC itself finds out late."""
    if credentials is not None and not isinstance(credentials, grpc.ChannelCredentials):
        raise invalid("credentials", f"such as grpc.ssl_channel_credentials(); got {shown(credentials)}")


def channel_options(address: str) -> list[tuple[str, Any]]:
    """Options of a channel to `address`."""
    return [
        # Pictures and clips are larger than gRPC's 4 MB.
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", -1),
        # The message of an error travels in a header; gRPC turns one that is larger than 8 KB into another error.
        ("grpc.max_metadata_size", 64 * 1024),
        # Finds dead connections below a long request. A server by default breaks a connection that pings more often
        # than every five minutes.
        ("grpc.keepalive_time_ms", 310_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        # A proxy cannot reach this machine by the name that it has for itself.
        ("grpc.enable_http_proxy", int(not _on_this_machine(address))),
    ]


def _on_this_machine(address: str) -> bool:
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


def as_metadata(metadata: object) -> Metadata:
    """Metadata in gRPC's form.

    Raises:
        InvalidRequest: names or values that no header can have.
    """
    wanted = "names and values of headers, printable ASCII, such as {'authorization': 'Bearer ...'}"
    pairs = metadata.items() if isinstance(metadata, Mapping) else metadata or ()
    if isinstance(pairs, str | bytes) or not hasattr(pairs, "__iter__"):
        raise invalid("metadata", wanted)
    found = []
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise invalid("metadata", wanted)  # without what it is: a value may be a secret
        name, value = pair[0].lower(), pair[1]
        if not _NAME.fullmatch(name) or name.endswith("-bin") or not _VALUE.fullmatch(value):
            raise invalid("metadata", f"{wanted}; got {shown(name)}")
        found.append((name, value))
    return tuple(found)


def may_be_unreachable(error: Any) -> bool:
    """Whether `error` may mean that nobody is there: gRPC and a full server use one status for it."""
    unavailable = error.code() is grpc.StatusCode.UNAVAILABLE and retry_hint(error.details() or "") is None
    return unavailable and not isinstance(error, StreamError)


def means_no_model(error: Any) -> bool:
    """Whether the server knows no model of that name, or no more."""
    return error.code() is grpc.StatusCode.NOT_FOUND


def means_nobody_there(error: Any) -> bool:
    """The same for the question whether somebody is: any other status is a sign of life."""
    return error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def failure(
    error: Any,
    address: str,
    request: Request | None,
    budget: Budget,
    *,
    reachable: bool,
    expected: bool,
) -> ImpromptError:
    """The exception for an `RpcError`.

    Args:
        request: what was asked for, unless it was a small question.
        reachable: whether a server answers at `address`.
        expected: whether the model of the call must be there: it was served before, or the server is not ready yet.
    """
    status, message = error.code(), error.details() or ""
    request_id = None if request is None else request.id
    if status in _TIME_IS_UP and budget.late:
        return budget.over(request_id)
    if not reachable:
        reason = _reason(message, address)
        # Who sends a request has had an answer from the address before.
        hint = f"; the address is to be {_WANTED}" if request is None else ""
        return ConnectionFailed(clipped(f"{address}: {reason}{hint}"), request_id=request_id)
    if request is None and status is grpc.StatusCode.DEADLINE_EXCEEDED:
        return ConnectionFailed(f"{address}: the server does not answer")
    if status is grpc.StatusCode.NOT_FOUND and expected:
        return Overloaded(clipped(message), request_id=request_id)  # Triton unloads its models when it stops
    return from_status(status, message, request_id=request_id)


_TIME_IS_UP = (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
"""What a call may end with when its caller's time is over: gRPC says the one, a server that stops work the other."""

_CAUSE = re.compile(r"(?:last error: (?:[A-Z]+: )?(?:ipv[46]:\S+: )?|hostname lookup error:)(?P<cause>.+?)\]?$")


def _reason(message: str, address: str) -> str:
    """Why nobody answers, by the details of gRPC's error."""
    cause = _CAUSE.search(message)
    reason = f"no server answers by gRPC: {cause['cause'] if cause else message}"
    proxy = next((name for name in _PROXIES if os.environ.get(name)), None)
    if proxy is not None and not _on_this_machine(address):
        reason += f"; the call went through the proxy of {proxy} (see no_proxy)"
    return reason
