"""`imprompt gateway`: the HTTP front of a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from imprompt.cli import console, packages


def gateway(
    url: console.Url = "localhost:8001",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 picks a free one.")] = 8080,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with the keys that callers must send, one per line; without it, none.")
    ] = None,
) -> None:
    """Serve OpenAI's images API and a playground over HTTP. Prints a line starting with `ready` once it listens."""
    server = packages.load("imprompt_gateway.server", "gateway")
    with console.reported_errors():
        keys = packages.load("imprompt_gateway.auth", "gateway").read_keys(api_key_file) if api_key_file else ()
        server.run(url, host=host, port=port, keys=keys, on_ready=_print_ready)


def _print_ready(address: str) -> None:
    print(f"ready {address}", flush=True)
