"""`imprompt bench`: measure a server, or a preset with random weights that is made, exported, served and stopped."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from imprompt import ImpromptError
from imprompt_bench import subject
from imprompt_bench.presets import PRESETS
from imprompt_bench.results import BenchError, environment
from imprompt_bench.session import SCENARIOS, Session
from imprompt_bench.workload import Workload

RESULTS = Path("benchmarks/results")
PAGES = (Path("docs/performance.md"), Path("docs/benchmarks.md"))
CALLERS = (1, 2, 4, 8)

# What can be chosen; type checkers do not see the members of those that are made from tables.
PresetName = StrEnum("PresetName", list(PRESETS))  # type: ignore[misc]
Scenario = StrEnum("Scenario", list(SCENARIOS))  # type: ignore[misc]
Baseline = StrEnum("Baseline", ["eager", "compiled", "bare", "none"])
BASELINES = (Baseline.eager, Baseline.bare)
"""Compiling a full-size UNet takes minutes, so `compiled` is for those who ask for it."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(stderr=True, highlight=False)


def main(arguments: Sequence[str]) -> int:
    """`imprompt bench`; returns the exit status."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read at import, which itself has warnings to give
    try:
        app(args=list(arguments), prog_name="imprompt bench", obj=shlex.join(["imprompt", "bench", *arguments]))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except (BenchError, ImpromptError, OSError) as error:
        return _failed(str(error))
    return 0


@app.callback(invoke_without_command=True)
def measure(
    context: typer.Context,
    preset: Annotated[
        PresetName | None, typer.Option(help="Architecture, with random weights (default: tiny).")
    ] = None,
    url: Annotated[str | None, typer.Option(help="gRPC address of a server that runs, in place of a preset.")] = None,
    model: Annotated[str | None, typer.Option(help="Bundle of that server.")] = None,
    metrics: Annotated[
        str | None,
        typer.Option(help="Its metrics, host:port (default: port 8002 of the same host, if they are there)."),
    ] = None,
    backend: Annotated[str, typer.Option(help="`engine.backend` of the preset's bundle.")] = "onnxruntime",
    precision: Annotated[str, typer.Option(help="`engine.precision` of the preset's bundle.")] = "fp32",
    scenario: Annotated[list[Scenario] | None, typer.Option(help="May be repeated (default: all).")] = None,
    baseline: Annotated[
        list[Baseline] | None,
        typer.Option(help="Beside a preset in `latency`; may be repeated (default: eager and bare)."),
    ] = None,
    size: Annotated[int | None, typer.Option(help="Edge of a picture in pixels.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps of a request.")] = None,
    requests: Annotated[int | None, typer.Option(help="Samples of each point.", min=1)] = None,
    callers: Annotated[list[int] | None, typer.Option(help="Of `closed`; may be repeated.", min=1)] = None,
    work: Annotated[Path | None, typer.Option(help="Folder that keeps what is exported, for the next time.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON to write.")] = Path("imprompt-bench.json"),
) -> None:
    """Measure latency, throughput, and what a server does under load; raw samples go to a JSON file."""
    if context.invoked_subcommand is not None:
        return
    if url is not None and (preset or baseline or model is None):
        raise typer.BadParameter("goes with --model, and without --preset and --baseline", param_hint="--url")
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.is_dir() or not os.access(output if output.exists() else output.parent, os.W_OK):
        raise BenchError(f"{output} cannot be written")
    name = preset.value if preset else "tiny"
    around = environment()  # now: what the machine is busy with later is this run
    measured: AbstractContextManager[subject.Subject]
    if url is not None and model is not None:
        measured, baselines = nullcontext(subject.running(url, model, metrics)), list[str]()
    else:
        measured = subject.made(name, backend=backend, precision=precision, work=work)
        baselines = [each.value for each in baseline or BASELINES if each != Baseline.none]
    with measured as served:
        defaults, described = PRESETS[name], served.capabilities
        workload = Workload(
            model=served.model,
            adapter=served.adapter,
            size=size or (defaults.size if url is None else described["defaults"]["height"]),
            steps=steps or defaults.steps,
            smallest=described["limits"]["height"][0],
        )
        session = Session(
            subject=served,
            workload=workload,
            requests=requests or defaults.requests,
            environment=around,
            console=console,
        )
        if served.observer.metrics_address is None:
            console.print(f"no metrics of {served.model} on port {subject.METRICS_PORT}: the server's own counters are "
                          "left out (--metrics says where they are)", soft_wrap=True)  # fmt: skip
        try:
            session.run([each.value for each in scenario or Scenario], baselines, callers or CALLERS)
        finally:
            if session.measurements:
                session.results(context.obj).save(output)
                print(output)


@app.command()
def overhead(
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON to write.")] = RESULTS / "overhead.json",
) -> None:
    """What a call of the UNet costs beside the UNet: the denoiser alone, with an engine that does nothing."""
    from imprompt_bench.overhead import measure_all

    measure_all(output)


@app.command()
def report(
    results: Annotated[Path, typer.Option(help="Folder of JSON files.")] = RESULTS,
    page: Annotated[
        list[Path] | None,
        typer.Option(help=f"Page to fill with tables; may be repeated (default: {PAGES[0]}, {PAGES[1]})."),
    ] = None,
) -> None:
    """Write tables and plots of the results into the documentation."""
    from imprompt_bench.report import write

    write(results, page or PAGES)


def _failed(message: str) -> int:
    console.print(f"[red]error:[/red] {escape(message)}", soft_wrap=True)
    return 1
