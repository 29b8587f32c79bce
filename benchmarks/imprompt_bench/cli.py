"""`imprompt bench`: measure a running server, or a preset with random weights that is exported and served for it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from imprompt import ImpromptError
from imprompt_bench import target
from imprompt_bench.fleet.traffic import ARRIVALS, MIX
from imprompt_bench.presets import PRESETS
from imprompt_bench.results import BenchError, environment
from imprompt_bench.session import SCENARIOS, Session
from imprompt_bench.workload import Workload

RESULTS = Path("benchmarks/results")
PAGES = (Path("docs/performance.md"), Path("docs/benchmarks.md"), Path("docs/scale.md"))
CALLERS = (1, 2, 4, 8)

# Choices of the options. Type checkers cannot see the members of enums built from tables.
PresetName = StrEnum("PresetName", list(PRESETS))  # type: ignore[misc]
Scenario = StrEnum("Scenario", list(SCENARIOS))  # type: ignore[misc]
Baseline = StrEnum("Baseline", ["eager", "compiled", "bare", "none"])
KindName = StrEnum("KindName", [kind.name for kind in MIX])  # type: ignore[misc]
ArrivalsName = StrEnum("ArrivalsName", list(ARRIVALS))  # type: ignore[misc]
POISSON = ArrivalsName("poisson")
BASELINES = (Baseline.eager, Baseline.bare)
"""The default baselines. `compiled` is not among them because compiling a full-size UNet takes minutes."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(stderr=True, highlight=False)


def main(arguments: Sequence[str]) -> int:
    """Run `imprompt bench`; return the exit status."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # must be set before the import, which already warns
    try:
        app(args=list(arguments), prog_name="imprompt bench", obj=shlex.join(["imprompt", "bench", *arguments]))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except (BenchError, ImpromptError, OSError) as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        return 1
    return 0


@app.callback(invoke_without_command=True)
def measure(
    context: typer.Context,
    preset: Annotated[
        PresetName | None, typer.Option(help="Architecture to measure, with random weights (default: tiny).")
    ] = None,
    url: Annotated[str | None, typer.Option(help="gRPC address of a running server to measure, not a preset.")] = None,
    model: Annotated[str | None, typer.Option(help="Bundle to measure on that server.")] = None,
    metrics: Annotated[
        str | None,
        typer.Option(help="host:port of that server's metrics (default: port 8002 of the same host, if available)."),
    ] = None,
    backend: Annotated[str, typer.Option(help="`engine.backend` of the preset's bundle.")] = "onnxruntime",
    precision: Annotated[str, typer.Option(help="`engine.precision` of the preset's bundle.")] = "fp32",
    scenario: Annotated[
        list[Scenario] | None, typer.Option(help="Scenario to measure; may be repeated (default: all).")
    ] = None,
    baseline: Annotated[
        list[Baseline] | None,
        typer.Option(help="Baseline to compare a preset with in `latency`; may be repeated (default: eager and bare)."),
    ] = None,
    size: Annotated[int | None, typer.Option(help="Height and width of a picture in pixels.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps per request.")] = None,
    requests: Annotated[int | None, typer.Option(help="Samples per measurement.", min=1)] = None,
    callers: Annotated[
        list[int] | None, typer.Option(help="Number of concurrent callers in `closed`; may be repeated.", min=1)
    ] = None,
    work: Annotated[Path | None, typer.Option(help="Folder in which to keep the exported preset for reuse.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file to write.")] = Path("imprompt-bench.json"),
) -> None:
    """Measure latency, throughput and behavior under load; write the raw samples to a JSON file."""
    if context.invoked_subcommand is not None:
        return
    if url is not None and (preset or baseline or model is None):
        raise typer.BadParameter("requires --model, and excludes --preset and --baseline", param_hint="--url")
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.is_dir() or not os.access(output if output.exists() else output.parent, os.W_OK):
        raise BenchError(f"cannot write to {output}")
    name = preset.value if preset else "tiny"
    before = environment()  # now, because the load average will soon include this run
    measured: AbstractContextManager[target.Target]
    if url is not None and model is not None:
        measured, baselines = nullcontext(target.connect(url, model, metrics)), list[str]()
    else:
        measured = target.serve_preset(name, backend=backend, precision=precision, work=work)
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
            target=served,
            workload=workload,
            requests=requests or defaults.requests,
            environment=before,
            console=console,
        )
        if served.observer.metrics_address is None:
            problem = f"no metrics of {served.model} on port {target.METRICS_PORT}"
            console.print(f"{problem}: leaving out server counters (set --metrics to include them)", soft_wrap=True)
        try:
            session.run([each.value for each in scenario or Scenario], baselines, callers or CALLERS)
        finally:
            if session.measurements:
                session.results(context.obj).save(output)
                print(output)


@app.command()
def overhead(
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file to write.")] = RESULTS / "overhead.json",
) -> None:
    """Measure the overhead of a denoising step, using a UNet engine that does nothing."""
    from imprompt_bench.overhead import measure_all

    measure_all(output)


@app.command()
def prompts(
    repository: Annotated[Path, typer.Argument(help="Exported model repository.")],
    model: Annotated[str, typer.Option(help="Bundle to measure.")],
    size: Annotated[int | None, typer.Option(help="Height and width of a picture (default: the bundle's).")] = None,
    rounds: Annotated[int, typer.Option(help="Measurements of each length.", min=1)] = 9,
) -> None:
    """Measure the CPU time that long prompts take, with the engines of an exported bundle."""
    from imprompt_bench.prompts import measure, table

    print(table(measure(repository, model, size=size, rounds=rounds)))


@app.command()
def routing(
    context: typer.Context,
    requests: Annotated[int, typer.Option(help="Requests through each way of routing, in each round.", min=1)] = 160,
    work: Annotated[Path | None, typer.Option(help="Folder in which to keep the exported preset for reuse.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file to write.")] = RESULTS
    / "fleet/routing.json",
) -> None:
    """Measure ways of routing, on three servers of the preset `tiny` behind Envoy. Needs a checkout."""
    from imprompt_bench.fleet.measure import measure

    say = partial(console.print, soft_wrap=True)
    measure(requests, work, context.obj, say).save(output)
    print(output)


@app.command()
def fleet(
    context: typer.Context,
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file to write.")] = RESULTS
    / "fleet/simulation.json",
) -> None:
    """Simulate ways of routing in fleets of 10 to 1,000 servers. Takes minutes."""
    from imprompt_bench.fleet.study import study

    study(context.obj, partial(console.print, soft_wrap=True)).save(output)
    print(output)


@app.command()
def size(
    rate: Annotated[float, typer.Option(help="Pictures per second; a clip counts as one.", min=0.001)],
    p99: Annotated[float, typer.Option(help="Seconds within which 99 % of the requests must be served.", min=0.001)],
    result: Annotated[
        Path | None,
        typer.Option(help="Result of `imprompt bench --scenario growth` on one server (default: SD 1.5 on an H200)."),
    ] = None,
    kind: Annotated[
        list[KindName] | None, typer.Option(help="Kind of request; may be repeated (default: a mix of all).")
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps per request.", min=1)] = 20,
    rows: Annotated[int, typer.Option(help="Most rows of a UNet call (`shapes.rows` of the bundle).", min=1)] = 16,
    arrivals: Annotated[ArrivalsName, typer.Option(help="How requests arrive.")] = POISSON,
    envoys: Annotated[int, typer.Option(help="Number of Envoys.", min=1)] = 2,
) -> None:
    """Say how many servers a load needs, by simulation."""
    from imprompt_bench.fleet.engine import SD15_H200, measured
    from imprompt_bench.fleet.sizing import answers
    from imprompt_bench.results import Run
    from imprompt_serving.specs import CallRows

    engine = SD15_H200 if result is None else measured(Run.load(result))
    mix = tuple(each for each in MIX if not kind or each.name in kind)
    found = answers(
        engine, rate=rate, p99=p99, mix=mix, steps=steps, call_rows=CallRows(rows), arrivals=arrivals, envoys=envoys
    )
    members = 0
    for members, outcome in found:
        print(
            f"{members:5} servers: p50 {outcome.percentile(50):.2f} s, p99 {outcome.percentile(99):.2f} s, "
            f"refused {outcome.refused:.1%}, idle {outcome.idle:.0%}"
        )
    print(f"{members} servers serve {rate:g} pictures/s with a p99 of at most {p99:g} s")


@app.command()
def cache(
    url: Annotated[list[str], typer.Option(help="gRPC address of a server; give at least two.")],
    model: Annotated[str, typer.Option(help="Bundle to measure.")],
    requests: Annotated[int, typer.Option(help="Different requests to send to each server.", min=1)] = 40,
) -> None:
    """Send the same requests to servers with a shared cache, which only the first has to encode."""
    from imprompt_bench.fleet.cache import STAGES, compare

    served = target.connect(url[0], model)
    size: int = served.capabilities["defaults"]["height"]
    smallest: int = served.capabilities["limits"]["height"][0]
    workload = Workload(model=model, adapter=served.adapter, size=size, steps=1, smallest=smallest)
    for address, seconds in zip(url, compare(url, workload, requests), strict=True):
        print(f"{address}: " + ", ".join(f"{stage} {1000 * seconds[stage]:.2f} ms" for stage in STAGES))


@app.command()
def report(
    results: Annotated[Path, typer.Option(help="Folder with the JSON files.")] = RESULTS,
    page: Annotated[
        list[Path] | None,
        typer.Option(help=f"Markdown page to update; may be repeated (default: {', '.join(map(str, PAGES))})."),
    ] = None,
) -> None:
    """Update the tables and plots in the documentation from the results."""
    from imprompt_bench.report import write

    write(results, page or PAGES)
