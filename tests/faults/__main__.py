"""`python -m faults`: inject every fault, record the outcomes, and print them as a table."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TextIO

import msgspec

from faults.cases import Case, Outcome, cases, drained, run
from faults.gateway import failed_gateway
from faults.server import Foreground, pick
from faults.soak import gateway, soak

BUNDLE = "world_lcm"
SMALL_FOLDERS = (
    "unshare",
    "--mount",
    "sh",
    "-c",
    'mount -t tmpfs -o size=100m tmpfs /dev/shm && mount -t tmpfs -o size=64m tmpfs "$TMPDIR" && exec "$@"',
    "sh",
)
"""Runs a command with small file systems of its own."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, 1 if a fault had a wrong outcome."""
    parser = argparse.ArgumentParser(prog="python -m faults", description="Inject faults into a real server.")
    parser.add_argument("--repository", type=Path, help="model repository (default: the demo's, exported if necessary)")
    parser.add_argument("--work", type=Path, default=Path(".demo"), help="folder for the demo's repository and the log")
    parser.add_argument("--only", default="", help="inject only the faults whose names contain this")
    parser.add_argument("--minutes", type=float, help="instead, inject faults at random for this long")
    parser.add_argument("--seed", type=int, default=0, help="chooses the faults of --minutes")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    repository = pick(options.repository or _demo_repository(options.work), BUNDLE, options.work / "one-bundle")
    if options.minutes is not None:
        return _soak(repository, options.work / "soak.json", minutes=options.minutes, seed=options.seed)
    failed = False
    with (options.work / "faults.jsonl").open("a") as record:
        for case in cases(BUNDLE):
            if options.only in case.name:
                failed |= not _run(case, repository, options.work, record)
        for word, number in (("kill -9", signal.SIGKILL), ("SIGSTOP", signal.SIGSTOP)):
            if options.only in (name := f"{word} gateway"):
                failed |= not _report(failed_gateway(name, gateway(number), repository, BUNDLE), record)
        for steps in (4, 1000):
            if options.only in f"SIGTERM, requests of {steps} steps":
                with Foreground(repository, "--drain-timeout", "10") as server:
                    failed |= not _report(drained(server.wait_until_ready(), [BUNDLE], steps), record)
    return int(failed)


def _soak(repository: Path, record: Path, *, minutes: float, seed: int) -> int:
    figures = soak(repository, BUNDLE, minutes=minutes, seed=seed)
    record.write_bytes(msgspec.json.format(msgspec.json.encode(figures)))
    print(figures.table())
    for problem in (*figures.lost, *figures.wrong, *figures.problems):
        print(f"FAILED {problem}")
    return int(not figures.good)


def _run(case: Case, repository: Path, work: Path, record: TextIO) -> bool:
    """Run one case with a new server, so that no earlier failure delays its restart; return whether it went well."""
    if case.small_folders and os.geteuid() != 0:
        print(f"SKIPPED {case.name}: needs root, to mount small file systems", flush=True)
        return True
    temporary = (work / "tmp").resolve()
    temporary.mkdir(exist_ok=True)
    wrapper = SMALL_FOLDERS if case.small_folders else ()
    with ExitStack() as stack:
        if case.serve is None:
            server = stack.enter_context(Foreground(repository, wrapper=wrapper, TMPDIR=str(temporary)))
        else:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="imprompt-faults-")))
            server = stack.enter_context(case.serve(repository, folder))
        try:
            outcome = run(case, server.wait_until_ready(), [BUNDLE])
        except AssertionError as error:
            print(f"FAILED {case.name}: {error}\n{server.output()[-2000:]}", flush=True)
            return False
    return _report(outcome, record)


def _report(outcome: Outcome, record: TextIO) -> bool:
    record.write(msgspec.json.encode(outcome).decode() + "\n")
    record.flush()
    print(row(outcome), flush=True)
    return not (outcome.lost or outcome.unanswered)


def _demo_repository(work: Path) -> Path:
    """Export the demo's bundles unless they are up to date. The import is local because it loads torch."""
    from imprompt_demo.demo import export_once

    return export_once(work)


def row(outcome: Outcome) -> str:
    """Format one outcome as a line of the table in docs/operations.md."""
    noticed = "-" if outcome.noticed is None else f"{outcome.noticed:.1f} s"
    seen = "; ".join(f"{count} x {error}" for error, count in outcome.seen.items()) or "pictures"
    return f"| {outcome.case} | {noticed} | {outcome.pictures:.1f} s | {seen} | {len(outcome.lost)} |"


if __name__ == "__main__":
    sys.exit(main())
