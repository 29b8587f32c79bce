"""`python -m fuzz`: run everything on the embedded bundle, or single cases on any repository."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from fuzz import processes, soak
from fuzz.cases import Case, case
from fuzz.runner import Harness, Log, Report, run, to_stderr
from fuzz.target import Target, read_targets
from imprompt_serving.launcher import Server

MAX_GROWTH_MB = 64.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description="Send hostile requests to a real server.")
    parser.add_argument("--repository", type=Path, help="model repository (default: the demo's, exported if necessary)")
    parser.add_argument("--work", type=Path, default=Path(".demo"), help="folder for the demo's repository and the log")
    parser.add_argument("--seed", type=int, default=0, help="seed of all cases")
    parser.add_argument("--cases", type=int, default=10_000, help="number of cases")
    parser.add_argument("--first", type=int, default=0, help="index of the first case")
    parser.add_argument("--only", type=int, nargs="*", help="run only the cases with these indices, and no soak test")
    parser.add_argument("--no-http", action="store_true", help="keep the HTTP port closed")
    parser.add_argument("--refusals", type=int, default=3_000, help="number of refused streams in the soak test")
    parser.add_argument("--cancels", type=int, default=1_000, help="number of canceled calls in the soak test")
    options = parser.parse_args(arguments)

    options.work.mkdir(parents=True, exist_ok=True)
    targets = read_targets(options.repository or _demo_repository(options.work))
    repository = options.repository or options.work / "repository"
    log = Log(options.work / "fuzz-server.log")
    indices = options.only if options.only is not None else range(options.first, options.first + options.cases)
    console = Console(width=None if sys.stdout.isatty() else 140)

    def start() -> Server:
        server = Server(repository, http_port=None if options.no_http else 0, log=log.file)
        server.start()
        return server

    with Harness(start(), targets, start=start, log=log) as harness:
        try:
            failed = _fuzz(harness, _cases(options.seed, indices, targets, http=not options.no_http), console)
            if options.only is None:
                failed |= _soak(harness, options.refusals, options.cancels, console)
        finally:
            harness.server.kill()
    return int(failed)


def _cases(seed: int, indices: Sequence[int], targets: Sequence[Target], *, http: bool) -> Iterator[Case]:
    return (case(seed, index, targets, http=http) for index in indices)


def _fuzz(harness: Harness, cases: Iterator[Case], console: Console) -> bool:
    """Run the cases, print the report, and return whether anything failed."""
    harness.warm_up()
    before = harness.usage()
    report: Report = run(harness, cases, progress=to_stderr)
    report.before, report.after = before, harness.usage()
    report.print(console)
    return bool(report.failures) or _memory_grew(report.before, report.after, console)


def _soak(harness: Harness, refusals: int, cancels: int, console: Console) -> bool:
    failed = False
    for result in (soak.refusals(harness, refusals), soak.cancels(harness, cancels)):
        result.print(console)
        failed |= bool(result.failures) or _memory_grew(result.before, result.after, console)
        if harness.ended():
            harness.revive()
            harness.warm_up()
    return failed


def _memory_grew(before: dict[str, processes.Usage], after: dict[str, processes.Usage], console: Console) -> bool:
    growth = processes.growth(before, after)
    if growth > MAX_GROWTH_MB:
        console.print(f"FAILED memory: a process grew by {growth:.0f} MB, more than {MAX_GROWTH_MB:.0f}")
    return growth > MAX_GROWTH_MB


def _demo_repository(work: Path) -> Path:
    """Export the demo's bundles unless they are up to date. The import is local because it loads torch."""
    from imprompt_demo.demo import export_once

    return export_once(work)


if __name__ == "__main__":
    sys.exit(main())
