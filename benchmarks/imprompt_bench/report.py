"""Format results as the tables of the documentation: `imprompt bench report`.

Replaces everything between `<!-- summary -->` and `<!-- end -->` by the comparison of all runs with the baselines, and
everything between `<!-- results -->` and `<!-- end -->` by a section for the JSON file of each run and the overhead of
the denoiser's loop. `fleet/report.py` makes the tables of `docs/scale.md`, which have places of their own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imprompt_bench.fleet import report as fleet_report
from imprompt_bench.markdown import interval, table
from imprompt_bench.results import Run
from imprompt_bench.run_tables import SYSTEMS, TABLES
from imprompt_bench.stats import percentile, ratio

OVERHEAD = "overhead.json"
RESULTS_PAGE = "benchmarks.md"
_PLACE = re.compile(r"(<!-- (summary|results|routing|fleet|details) -->\n).*?(<!-- end -->)", re.DOTALL)
_PLOTS = {
    "load": "Latency by number of callers and by arrival rate",
    "growth": "Latency by size of the request",
    "request": "When each stage of a request begins and ends",
}


def write(results: Path, pages: Sequence[Path]) -> None:
    """Update `pages` from the files in `results`, and draw their plots into the folder `images` next to the first."""
    from imprompt_bench.plots import draw

    images = pages[0].parent / "images"
    for name, run in runs(results).items():
        draw(run, name, images)
    fleet_report.draw(results, images)
    for page in pages:
        page.write_text(filled(page.read_text(encoding="utf-8"), results, images), encoding="utf-8")


def runs(results: Path) -> dict[str, Run]:
    """Load every run in `results`, by file name."""
    return {file.stem: Run.load(file) for file in sorted(results.glob("*.json")) if file.name != OVERHEAD}


def filled(page: str, results: Path, images: Path) -> str:
    """Return `page` with its results replaced."""
    measured = runs(results)
    parts = [section(name, run, images) for name, run in measured.items()]
    if (results / OVERHEAD).exists():
        parts.append(overhead(json.loads((results / OVERHEAD).read_text())))
    tables = {"summary": summary(measured), "results": "".join(parts), **fleet_report.tables(results)}
    return _PLACE.sub(lambda place: f"{place[1]}{tables[place[2]]}{place[3]}", page)


def summary(measured: Mapping[str, Run]) -> str:
    """Compare the server with each baseline: a table for each machine and day, newest first, a line for each file."""
    groups: dict[str, dict[str, Run]] = {}
    for name, run in sorted(measured.items(), key=lambda item: item[1].environment["date"], reverse=True):
        if len(run.of("latency")) > 1:
            groups.setdefault(_hardware(run.environment), {})[name] = run
    if not groups:
        return ""
    text = (
        "Latency of a served request, and its speed-up over each baseline (above 1: the server is faster), with 95 % "
        "intervals. All rows of a table were measured on the same machine on the same day. For a bundle in bf16, "
        "diffusers computes in bf16 as well, and otherwise in fp32."
    )
    tables = (f"### {hardware}\n\n{_comparison(group)}\n\n" for hardware, group in groups.items())
    return f"## Comparison with the baselines\n\n{text}\n\n{''.join(tables)}"


def _comparison(measured: Mapping[str, Run]) -> str:
    systems = {
        name: {measurement.label: measurement.latencies() for measurement in run.of("latency")}
        for name, run in measured.items()
    }
    others = [name for name in SYSTEMS if name != "imprompt" and any(name in own for own in systems.values())]
    rows = []
    for name, run in measured.items():
        own = systems[name]["imprompt"]
        speedups = [interval(ratio(systems[name][other], own), 2) if other in systems[name] else "" for other in others]
        latency = interval(percentile(own, 50), 2)
        rows.append([f"[{name}]({RESULTS_PAGE}#{name})", _title(run), *_requests(run), latency, *speedups])
    columns = ["run", "bundle", "pixels", "steps", "p50 latency, s"]
    return table([*columns, *(f"speed-up over {SYSTEMS[name]}" for name in others)], rows)


def _title(run: Run) -> str:
    return f"{run.bundle['name']}, {run.bundle['backend']}, {run.bundle['precision']}"


def _requests(run: Run) -> tuple[str, str]:
    return f"{run.bundle['size']} x {run.bundle['size']}", str(run.bundle["steps"])


def section(name: str, run: Run, images: Path) -> str:
    """Format one run."""
    pixels, steps = _requests(run)
    blocks = [
        f"## `{name}`",
        f"{_title(run)}: requests for {pixels} pixels in {steps} steps, with guidance, an image prompt and a unique "
        "prompt.",
        _machine(run.environment),
        f"```sh\n{run.command}\n```",
    ]
    blocks += [f"### {title}\n\n{text}" for title, make in TABLES if (text := make(run))]
    blocks += [f"![{alt}](images/bench-{name}-{plot}.svg)" for plot, alt in _PLOTS.items() if _has(images, name, plot)]
    return "\n\n".join(["", *blocks]).lstrip("\n") + "\n\n"


def _has(images: Path, name: str, plot: str) -> bool:
    return (images / f"bench-{name}-{plot}.svg").exists()


def _machine(environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    load = environment["load_average"][0]
    return f"{_hardware(environment)}; Python {environment['python']}, {versions}; load average {load} before the run."


def _hardware(environment: dict[str, Any]) -> str:
    machine = f", machine {environment['machine']}" if "machine" in environment else ""
    return (
        f"{environment['cpu']}, {environment['cores']} cores, {environment['memory_gib']} GiB{machine}, "
        f"{environment['date']}"
    )


def overhead(result: dict[str, Any]) -> str:
    """Format the results of `imprompt bench overhead`."""
    rows = [
        [row["scheduler"], str(row["jobs"]), f"{row['median_ms']:.3f}", f"{row['fastest_ms']:.3f}"]
        for row in result["overhead_per_tick"]
    ]
    text = (
        f"## Overhead of the denoiser's loop\n\nThe cost of a step in addition to the UNet, which is an engine that "
        f"does nothing here, for jobs of {result['size']} x {result['size']} pixels that share every call.\n\n"
    )
    header = ["scheduler", "jobs", "median ms per step", "fastest ms per step"]
    return (
        f"{text}{_machine(result['environment'])}\n\n```sh\nimprompt bench overhead\n```\n\n{table(header, rows)}\n\n"
    )
