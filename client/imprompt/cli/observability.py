"""The log and the spans of `imprompt serve` and `imprompt gateway`, whose processes find them in the environment."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from imprompt.cli import console

_LOG_VARIABLE, _ENDPOINT_VARIABLE = "IMPROMPT_REQUEST_LOG", "OTEL_EXPORTER_OTLP_ENDPOINT"

REQUEST_LOG = typer.Option(
    envvar=_LOG_VARIABLE,
    metavar="FILE",
    help="File that gets a JSON line when a request ends; - is standard error, /dev/null is none.",
)
OTLP_ENDPOINT = typer.Option(
    envvar=_ENDPOINT_VARIABLE,
    metavar="URL",
    help="OpenTelemetry collector that gets the spans of requests (OTLP over HTTP), such as http://localhost:4318.",
)


def observe(request_log: str, otlp_endpoint: str | None) -> None:
    """Set up the log and the spans of this process and its children."""
    if request_log != "-":
        file = Path(request_log).absolute()  # Triton runs in another folder
        try:
            file.open("a").close()
        except OSError as error:
            console.fail(f"cannot write {file}: {error.strerror}")
        request_log = str(file)
    os.environ[_LOG_VARIABLE] = request_log
    if otlp_endpoint is not None:  # processes without the extra `otel` warn
        os.environ[_ENDPOINT_VARIABLE] = otlp_endpoint
