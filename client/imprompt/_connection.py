"""How to reach a server: its address, TLS, and the metadata of every call. Reads certificate files only."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import grpc

from imprompt._errors import invalid, short_repr

Certificate: TypeAlias = str | os.PathLike[str] | bytes
"""Path of a PEM file, or its content."""
Metadata: TypeAlias = tuple[tuple[str, str], ...]

URL_VARIABLE, TOKEN_VARIABLE = "IMPROMPT_URL", "IMPROMPT_TOKEN"
DEFAULT_URL = "localhost:8001"
DEFAULT_PORT = 8001
EXPECTED = "must be the host:port of the server's gRPC endpoint, such as localhost:8001 (grpcs://host:port with TLS)"
_TLS = "grpcs://"
_ADDRESS = re.compile(r"(?P<host>[\w.-]+|\[[0-9a-fA-F:.]+\])(:(?P<port>[0-9]{1,5}))?")
_SOCKET = "unix:"
_SHORT_IP = re.compile(r"[\d.]+")
"""Abbreviated addresses such as 127.1, which resolvers read as 127.0.0.1."""
_LOOPBACK_NAMES = ("localhost", "localhost.localdomain", "localhost4", "localhost6", "ip6-localhost", "ip6-loopback")
_HEADER_NAME = re.compile(r"[a-z0-9_.-]+")
_HEADER_VALUE = re.compile(r"[ -~]*")
_TOKEN = re.compile(r"[!-~]+")
_AUTHORIZATION = "authorization"


@dataclass(frozen=True, kw_only=True, slots=True)
class Connection:
    """Where and how to connect, validated."""

    address: str
    """`host:port`, or `unix:path`."""
    credentials: grpc.ChannelCredentials | None
    """None for a connection without TLS."""
    metadata: Metadata
    """Sent with every call."""

    @classmethod
    def resolve(
        cls,
        url: object,
        *,
        token: object = None,
        root_certificates: object = None,
        client_certificate: object = None,
        client_key: object = None,
        credentials: object = None,
        metadata: object = None,
    ) -> Connection:
        """Validate the options of a client; `url` and `token` default to the environment.

        Raises:
            InvalidRequest: an option is invalid, or a certificate file cannot be read.
        """
        url = os.environ.get(URL_VARIABLE) or DEFAULT_URL if url is None else url
        token = os.environ.get(TOKEN_VARIABLE) or None if token is None else token
        pem = {"client_certificate": client_certificate, "client_key": client_key}
        for name, other in (("client_certificate", "client_key"), ("client_key", "client_certificate")):
            if pem[name] is not None and pem[other] is None:
                raise invalid(name, f"needs a {other}")
        pem["root_certificates"] = root_certificates
        given = [name for name, value in pem.items() if value is not None]
        if credentials is not None:
            if not isinstance(credentials, grpc.ChannelCredentials):
                problem = f"must be ChannelCredentials of gRPC; got {short_repr(credentials)}"
                raise invalid("credentials", problem)
            if given:
                raise invalid("credentials", f"cannot be combined with {given[0]}")
        elif given or (isinstance(url, str) and url.strip().startswith(_TLS)):
            files = {name: _read_pem(name, pem[name]) for name in given}
            credentials = grpc.ssl_channel_credentials(
                files.get("root_certificates"), files.get("client_key"), files.get("client_certificate")
            )
        headers = check_metadata(metadata)
        if token is not None:
            headers += _authorization(token, headers)
        return cls(address=check_url(url), credentials=credentials, metadata=headers)

    def channel(self, factory: Any) -> Any:
        """Open a channel with `grpc` or `grpc.aio`."""
        if self.credentials is None:
            return factory.insecure_channel(self.address, channel_options(self.address))
        return factory.secure_channel(self.address, self.credentials, channel_options(self.address))


def check_url(url: object) -> str:
    """Normalize the address of a gRPC endpoint to `host:port`; the default port is 8001.

    Raises:
        InvalidRequest: `url` is something else, such as a web address.
    """
    if not isinstance(url, str):
        raise invalid("url", f"{EXPECTED}; got {short_repr(url)}")
    address = url.strip().removeprefix("grpc://").removeprefix(_TLS)
    if "://" in address:
        raise invalid("url", f"{EXPECTED}, without http:// (port 8000 is HTTP, 8002 metrics); got {short_repr(url)}")
    if address.startswith(_SOCKET) and address.isprintable():
        return address
    if _ip(address) is not None and ":" in address:
        address = f"[{address}]"
    parts = _ADDRESS.fullmatch(address)
    if parts is None or (parts["port"] is not None and not 0 < int(parts["port"]) < 2**16):
        raise invalid("url", f"{EXPECTED}; got {short_repr(url)}")
    return address if parts["port"] else f"{address}:{DEFAULT_PORT}"


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
        # By default, the pauses between attempts to reach a lost server grow to two minutes.
        ("grpc.max_reconnect_backoff_ms", 1_000),
        # A proxy cannot reach this machine under a loopback name.
        ("grpc.enable_http_proxy", int(not is_local(address))),
    ]


def is_local(address: str) -> bool:
    """Whether `host:port` is this machine by a loopback name or address."""
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


def _read_pem(parameter: str, value: object) -> bytes:
    data = value
    if isinstance(value, str | os.PathLike):
        try:
            data = Path(value).read_bytes()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise invalid(parameter, f"cannot read {short_repr(str(value))}: {reason}") from None
    # Never show the content: it may be a key.
    if not isinstance(data, bytes) or b"-----BEGIN " not in data:
        raise invalid(parameter, "must be a PEM file: its path, or its content as bytes")
    return data


def _authorization(token: object, headers: Metadata) -> Metadata:
    # Never show the token in an error.
    if not isinstance(token, str) or not _TOKEN.fullmatch(token):
        raise invalid("token", "must be printable ASCII without spaces")
    if any(name == _AUTHORIZATION for name, _ in headers):
        raise invalid("token", f"metadata already has {_AUTHORIZATION}")
    return ((_AUTHORIZATION, f"Bearer {token}"),)


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
        if not _HEADER_NAME.fullmatch(name) or name.endswith("-bin") or not _HEADER_VALUE.fullmatch(value):
            raise invalid("metadata", f"{expected}; got {short_repr(name)}")
        headers.append((name, value))
    return tuple(headers)
