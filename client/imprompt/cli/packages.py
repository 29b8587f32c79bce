"""Commands that live in other packages: `export`, `serve`, `demo` and `bench`.

Each package is imported only when its command runs, because a client installs without it. If it is missing, the command
says what to install.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from imprompt.cli import console
from imprompt.cli.gateway_process import Gateway, beside_server
from imprompt.cli.observability import OTLP_ENDPOINT, REQUEST_LOG, observe

_OWN_PACKAGES = (
    "imprompt",
    "imprompt_bench",
    "imprompt_demo",
    "imprompt_export",
    "imprompt_gateway",
    "imprompt_serving",
)


class Restart(StrEnum):
    """What `imprompt serve` does when the server fails."""

    ON_FAILURE = "on-failure"
    NEVER = "never"


def export(
    bundle: Annotated[Path, typer.Argument(help="Bundle file (TOML).")],
    repository: Annotated[Path, typer.Option("--output", "-o", help="Model repository to write to.")],
    refit_from: Annotated[
        Path | None,
        typer.Option(help="Folder of TensorRT engines for the same architecture, to refit with the new weights."),
    ] = None,
) -> None:
    """Compile a checkpoint set into a Triton model repository, and compare every engine with PyTorch."""
    package = load("imprompt_export", "export")
    try:
        with _install_hint("export"):
            rows = package.export(bundle, repository, refit_from=refit_from)
    except (package.BundleError, package.EngineError, OSError) as error:
        console.fail(str(error))
    # Evaluated only if the error is none of the above: importing this module loads torch, which takes seconds.
    except load("imprompt_export.parity", "export").ParityError as error:
        console.fail(str(error))
    console.out.print(load("imprompt_export.report", "export").table(rows))


def serve(
    repository: Annotated[Path, typer.Argument(help="Model repository written by `imprompt export`.")],
    grpc_port: Annotated[int, typer.Option(help="gRPC port; 0 picks a free one.")] = 8001,
    http_port: Annotated[
        int | None, typer.Option(help="Also open Triton's HTTP port, which is closed by default; 0 picks a free one.")
    ] = None,
    metrics_port: Annotated[int, typer.Option(help="Metrics port; 0 picks a free one.")] = 8002,
    health_port: Annotated[
        int | None,
        typer.Option(help="Also answer `/livez` and `/readyz` over HTTP on this port; 0 picks a free one."),
    ] = None,
    gateway_port: Annotated[
        int | None, typer.Option(help="Also run `imprompt gateway` on this port; 0 picks a free one.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    allow_remote: Annotated[
        bool,
        typer.Option(help="Listen on an address that other machines reach, even if callers can crash this Triton."),
    ] = False,
    restart: Annotated[
        Restart, typer.Option(help="What to do when the server fails: restart it, or exit with an error.")
    ] = Restart.ON_FAILURE,
    max_canary_age: Annotated[
        float, typer.Option(help="Seconds after which a bundle that made no picture is no longer ready.", min=5.0)
    ] = 30.0,
    drain_timeout: Annotated[float, typer.Option(help="Seconds to let running requests finish on shutdown.")] = 30.0,
    request_log: Annotated[str, REQUEST_LOG] = "-",
    otlp_endpoint: Annotated[str | None, OTLP_ENDPOINT] = None,
    triton_spans: Annotated[
        bool, typer.Option(help="Also send the spans of Triton itself, of requests whose caller traces them.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show all of Triton's output.")] = False,
) -> None:
    """Run Triton in the foreground, and restart it when it fails. Ctrl-C drains.

    Prints a line that starts with `ready` once every bundle has made a picture.
    """
    if triton_spans and otlp_endpoint is None:
        console.fail("--triton-spans needs --otlp-endpoint")
    observe(request_log, otlp_endpoint)
    launcher = load("imprompt_serving.launcher", "server")
    if gateway_port is not None:
        load("imprompt_gateway.server", "gateway")
    children, gateways = ExitStack(), list[Gateway]()

    def print_ready(addresses: Any) -> None:
        loading.stop()
        line = f"ready {addresses}"
        if gateway_port is not None:
            gateway = beside_server(
                addresses.grpc,
                addresses.health,
                host=host,
                port=gateway_port,
                next_pause=launcher.Backoff().next_pause if restart is Restart.ON_FAILURE else None,
            )
            gateways.append(children.enter_context(gateway))
            line += f" gateway={gateways[0].address}"
        print(line, flush=True)

    # On a terminal, one line that changes.
    loading = console.err.status("starting")
    loading.start()
    try:
        status = launcher.serve(
            repository,
            grpc_port=grpc_port,
            http_port=http_port,
            metrics_port=metrics_port,
            health_port=0 if health_port is None and gateway_port is not None else health_port,
            host=host,
            allow_remote=allow_remote,
            on_ready=print_ready,
            on_loading=loading.update if console.err.is_terminal else partial(console.err.print, soft_wrap=True),
            restart=restart is Restart.ON_FAILURE,
            max_canary_age=max_canary_age,
            drain_timeout=drain_timeout,
            triton_spans_to=otlp_endpoint if triton_spans else None,
            verbose=verbose,
        )
    except launcher.LaunchError as error:
        loading.stop()
        console.fail(str(error))
    finally:
        loading.stop()
        children.close()
    raise typer.Exit(status or int(any(gateway.failed for gateway in gateways)))


def doctor(
    repository: Annotated[
        Path | None, typer.Argument(help="Model repository written by `imprompt export`, to check as well.")
    ] = None,
) -> None:
    """Check whether this machine can serve, and print versions, GPUs, limits, and what is wrong."""
    examination = load("imprompt_serving.launcher.doctor", "server").examine(repository)
    for finding in examination:
        color = {"ok": "green", "warning": "yellow", "error": "red"}[finding.verdict]
        console.out.print(
            f"[{color}]{finding.verdict:8}[/{color}]{finding.subject:13}{escape(finding.text)}",
            soft_wrap=True,
            highlight=False,
        )
    raise typer.Exit(int(any(finding.verdict == "error" for finding in examination)))


def demo(context: typer.Context) -> None:
    """Export, serve and use the embedded bundle, from checkpoints to pictures."""
    try:
        package = importlib.import_module("imprompt_demo")
    except ModuleNotFoundError as error:
        if error.name != "imprompt_demo":
            raise
        console.fail("The demo is a separate package: in a checkout, run `make demo` or `pip install ./demo`")
    with _install_hint("cpu,export,server"):
        raise typer.Exit(package.main(context.args))


def bench(context: typer.Context) -> None:
    """Measure the latency and throughput of a server."""
    package = load("imprompt_bench.cli", "bench")
    with _install_hint("bench,cpu,export,server"):
        raise typer.Exit(package.main(context.args))


def load(module: str, extra: str) -> Any:
    """Import a module of another package, or say which extra to install for it."""
    with _install_hint(extra, module):
        return importlib.import_module(module)


@contextmanager
def _install_hint(extra: str, package: str = "") -> Iterator[None]:
    """Turn a failed import of a dependency into an error that names the extra to install.

    Args:
        extra: the extra that installs what the body imports.
        package: a package of this project that may be missing as well.
    """
    try:
        yield
    except ImportError as error:
        if error.name != package and _is_our_bug(error):
            raise
        console.fail(f'{error}. This command needs more packages: pip install "imprompt[{extra}]"')


def _is_our_bug(error: ImportError) -> bool:
    """Whether `error` is about one of our own modules, or about a name that one of them wrongly expects elsewhere."""
    if (error.name or "").partition(".")[0] in _OWN_PACKAGES:
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    module = frame.f_globals.get("__name__", "")
    return not isinstance(error, ModuleNotFoundError) and module.partition(".")[0] in _OWN_PACKAGES
