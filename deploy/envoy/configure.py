"""Write the configuration of an Envoy that spreads requests over imprompt servers.

    python deploy/envoy/configure.py gpu-1 gpu-2 gpu-3:8001:8003 > envoy.yaml
    envoy -c envoy.yaml

Each server is `HOST[:GRPC_PORT[:HEALTH_PORT]]`, and runs `imprompt serve REPO --host HOST --health-port 8003`. The Helm
chart uses the same template.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

TEMPLATE = Path(__file__).parents[1] / "helm/imprompt/files/envoy.yaml"
_INDENT = " " * 14
"""Of the list of endpoints in the template."""


class Member(NamedTuple):
    """A server behind Envoy."""

    host: str
    grpc_port: int = 8001
    health_port: int = 8003

    @classmethod
    def parse(cls, text: str) -> Member:
        """Parse `HOST[:GRPC_PORT[:HEALTH_PORT]]`."""
        host, *ports = text.split(":")
        if not host or len(ports) > 2 or not all(port.isdecimal() and 0 < int(port) < 65536 for port in ports):
            raise argparse.ArgumentTypeError(f"{text!r} is not HOST[:GRPC_PORT[:HEALTH_PORT]]")
        return cls(host, *map(int, ports))

    def endpoint(self) -> str:
        """Format as an endpoint of Envoy's, in YAML."""
        return (
            f"- endpoint: {{ address: {{ socket_address: {{ address: {self.host}, port_value: {self.grpc_port} }} }}, "
            f"health_check_config: {{ port_value: {self.health_port} }} }}"
        )


def configuration(members: list[Member], *, host: str = "0.0.0.0", port: int = 8001, admin_port: int = 9901) -> str:
    """Fill in the template; `host` and `port` are what callers connect to."""
    values = {
        "LISTEN_HOST": host,
        "LISTEN_PORT": str(port),
        "ADMIN_PORT": str(admin_port),
        "ENDPOINTS": f"\n{_INDENT}".join(member.endpoint() for member in members),
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace(name, value)
    return text


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("members", nargs="+", type=Member.parse, metavar="HOST[:GRPC_PORT[:HEALTH_PORT]]")
    parser.add_argument("--host", default="0.0.0.0", help="address for callers (default: all)")
    parser.add_argument("--port", type=int, default=8001, help="port for callers (default: 8001)")
    parser.add_argument("--admin-port", type=int, default=9901, help="Envoy's own, on loopback (default: 9901)")
    given = parser.parse_args(arguments)
    sys.stdout.write(configuration(given.members, host=given.host, port=given.port, admin_port=given.admin_port))


if __name__ == "__main__":
    main()
