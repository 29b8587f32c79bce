"""`imprompt gateway`: the HTTP front of a server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from imprompt.cli import console, packages
from imprompt.cli.observability import OTLP_ENDPOINT, REQUEST_LOG, observe
from imprompt.cli.options import CONNECTION, with_options


@with_options(CONNECTION)
def gateway(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 picks a free one.")] = 8080,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            envvar="IMPROMPT_API_KEY_FILE",
            help="File with the API keys of the callers, one per line. Without it, callers need none.",
        ),
    ] = None,
    health_url: Annotated[
        str | None,
        typer.Option(
            help="Answers 200 while the server makes pictures, such as http://localhost:8003/readyz of a server with "
            "--health-port 8003 (default: ask Triton)."
        ),
    ] = None,
    request_log: Annotated[str, REQUEST_LOG] = "-",
    otlp_endpoint: Annotated[str | None, OTLP_ENDPOINT] = None,
    until_stdin_closes: Annotated[bool, typer.Option(hidden=True)] = False,
    **connection: Any,
) -> None:
    """Serve OpenAI's images API and a playground over HTTP. Prints a line starting with `ready` once it listens."""
    observe(request_log, otlp_endpoint)
    server = packages.load("imprompt_gateway.server", "gateway")
    parent = sys.stdin if until_stdin_closes else None
    try:
        server.run(
            connection,
            host=host,
            port=port,
            health_url=health_url,
            key_file=api_key_file,
            on_ready=_print_ready,
            parent=parent,
        )
    except (OSError, ValueError) as error:
        console.fail(str(error))


def _print_ready(address: str) -> None:
    print(f"ready {address}", flush=True)
