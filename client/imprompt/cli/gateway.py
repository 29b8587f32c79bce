"""`imprompt gateway`: the HTTP front of a server, by itself or beside `imprompt serve`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from imprompt.cli import console, packages

_DRAIN_S = 35
"""How long to wait for a gateway that ends: a little longer than it waits for its requests."""


def gateway(
    url: console.Url = "localhost:8001",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 picks a free one.")] = 8080,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            envvar="IMPROMPT_API_KEY_FILE",
            help="File with the API keys of the callers, one per line. Without it, callers need none.",
        ),
    ] = None,
    until_stdin_closes: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Serve OpenAI's images API and a playground over HTTP. Prints a line starting with `ready` once it listens."""
    server = packages.load("imprompt_gateway.server", "gateway")
    with console.reported_errors():
        keys = packages.load("imprompt_gateway.auth", "gateway").read_keys(api_key_file) if api_key_file else ()
        server.run(
            url,
            host=host,
            port=port,
            keys=keys,
            on_ready=_print_ready,
            parent=sys.stdin if until_stdin_closes else None,
        )


def _print_ready(address: str) -> None:
    print(f"ready {address}", flush=True)


@contextmanager
def beside_server(grpc_address: str, *, host: str, port: int) -> Iterator[str]:
    """Run a gateway in a child process, and yield its address. The child ends with this process, however that ends."""
    command = [sys.executable, "-m", "imprompt.cli.gateway", "--until-stdin-closes", "--url", grpc_address]
    child = subprocess.Popen(
        [*command, "--host", host, "--port", str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,  # Ctrl-C must reach only the launcher, which lets running requests finish
    )
    try:
        assert child.stdout is not None
        ready, _, address = child.stdout.readline().strip().partition(" ")
        if ready != "ready":
            console.fail("the gateway did not start")
        yield address
    finally:
        child.terminate()
        try:
            child.wait(_DRAIN_S)
        except subprocess.TimeoutExpired:
            child.kill()


if __name__ == "__main__":
    typer.run(gateway)
