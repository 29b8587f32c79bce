"""`python -m fuzz`: all of it over the embedded bundle, or single cases over any repository."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from fuzz import processes, soak
from fuzz.cases import Case, case
from fuzz.runner import Attacked, Log, Report, run, to_stderr
from fuzz.target import Target, read_targets
from imprompt_serving.launcher import Server

MOST_GROWTH_MB = 64.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 when something failed."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description="Hostile requests against a real server.")
    parser.add_argument("--repository", type=Path, help="model repository (default: that of the demo, made if need be)")
    parser.add_argument("--work", type=Path, default=Path(".demo"), help="where that repository and the log are kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="index of the first case")
    parser.add_argument("--only", type=int, nargs="*", help="indices of the cases to run, and no soak")
    parser.add_argument("--no-http", action="store_true", help="leave the HTTP port closed")
    parser.add_argument("--refusals", type=int, default=3_000, help="refused streams of the soak")
    parser.add_argument("--cancels", type=int, default=1_000, help="cancelled calls of the soak")
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

    with Attacked(start(), targets, start=start, log=log) as attacked:
        try:
            failed = _fuzz(attacked, _cases(options.seed, indices, targets, http=not options.no_http), console)
            if options.only is None:
                failed |= _soak(attacked, options.refusals, options.cancels, console)
        finally:
            attacked.server.kill()
    return int(failed)


def _cases(seed: int, indices: Sequence[int], targets: Sequence[Target], *, http: bool) -> Iterator[Case]:
    return (case(seed, index, targets, http=http) for index in indices)


def _fuzz(attacked: Attacked, cases: Iterator[Case], console: Console) -> bool:
    """Run and print; whether something failed."""
    attacked.warm_up()
    before = attacked.usage()
    report: Report = run(attacked, cases, progress=to_stderr)
    report.before, report.after = before, attacked.usage()
    report.print(console)
    return bool(report.failures) or _grew(report.before, report.after, console)


def _soak(attacked: Attacked, refusals: int, cancels: int, console: Console) -> bool:
    failed = False
    for result in (soak.refusals(attacked, refusals), soak.cancels(attacked, cancels)):
        result.print(console)
        failed |= bool(result.failures) or _grew(result.before, result.after, console)
        if attacked.ended():
            attacked.revive()
            attacked.warm_up()
    return failed


def _grew(before: dict[str, processes.Usage], after: dict[str, processes.Usage], console: Console) -> bool:
    growth = processes.growth(before, after)
    if growth > MOST_GROWTH_MB:
        console.print(f"FAILED memory: a process grew by {growth:.0f} MB; at most {MOST_GROWTH_MB:.0f} are allowed")
    return growth > MOST_GROWTH_MB


def _demo_repository(work: Path) -> Path:
    """Exported as the demo does it; imported here, as it takes torch to do so."""
    from imprompt_demo.demo import export_once

    return export_once(work)


if __name__ == "__main__":
    sys.exit(main())
