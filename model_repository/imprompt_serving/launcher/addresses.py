"""The addresses and ports that a server listens on."""

from __future__ import annotations

import ipaddress
import socket
from contextlib import ExitStack
from dataclasses import dataclass

from imprompt_serving.launcher.install import KNOWN_FAULTS, LaunchError, TritonInstall


@dataclass(frozen=True, kw_only=True, slots=True)
class Addresses:
    """Addresses that a running server listens on, as `host:port`; None for ports that are closed."""

    grpc: str
    metrics: str
    http: str | None = None
    health: str | None = None

    def __str__(self) -> str:
        named = {"grpc": self.grpc, "http": self.http, "metrics": self.metrics, "health": self.health}
        return " ".join(f"{name}={address}" for name, address in named.items() if address)


def check_exposure(host: str, triton: TritonInstall) -> None:
    """Check that only this machine can reach `host`, if callers can crash `triton`.

    Raises:
        LaunchError: other machines can.
    """
    faults = KNOWN_FAULTS.get(triton.version)
    if faults and not _is_loopback(host):
        raise LaunchError(
            f"other machines could reach {host}, and callers can crash Triton {triton.version}: {'; '.join(faults)}. "
            "Use NVIDIA's Triton container, put `imprompt gateway` in front of a server on 127.0.0.1, or, if you trust "
            "all callers, pass --allow-remote"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback
    except OSError:
        return True  # `free_ports` reports unknown hosts


def free_ports(host: str, requested: dict[str, int]) -> tuple[str, dict[str, int]]:
    """Return the numeric address (Triton accepts no host names), and the ports, with free ones in place of 0.

    Raises:
        LaunchError: a port is in use, or `host` is not an address of this machine.
    """
    ports: dict[str, int] = {}
    with ExitStack() as probes:  # keep all open until the end, so that no port is assigned twice
        for name, port in requested.items():
            probe = probes.enter_context(socket.socket())
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                address = socket.gethostbyname(host)
                probe.bind((address, port))
            except OSError as error:
                raise LaunchError(f"cannot listen on {host}:{port} (the {name} port): {error.strerror}") from error
            ports[name] = probe.getsockname()[1]
    return address, ports


def listens(address: str) -> bool:
    """Return whether a server accepts connections at `address`."""
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return False
    return True
