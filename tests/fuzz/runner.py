"""Run cases in sequence, check the server's health between them, and report."""

from __future__ import annotations

import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any, Self

import numpy as np
from rich.console import Console
from rich.table import Table

from fuzz import processes, valid
from fuzz.cases import Case
from fuzz.keywords import as_keywords
from fuzz.processes import Usage
from fuzz.target import Target
from fuzz.tensors import Tensor, message, tensor, tensors
from fuzz.transports import Answer, Connections, Stream, Unary
from fuzz.verdicts import is_triton_error, verdict
from imprompt_serving.launcher import Server

DEADLINE_S = 90.0
"""Deadline of a case, far above what any needs even on a busy machine; a case that reaches it hangs."""
SLOW_S = 5.0
PROBE_EVERY = 25
"""Number of cases between health probes."""
SAME_LEVELS = 2
"""How much a probe's picture may differ from the first one, in levels of 255; it may share a batch with another job."""
SETTLE_S = 7.0
"""How long to wait before measuring memory; the server keeps sent responses for 5 s."""
SMALL_REQUESTS = 100
PROGRESS_EVERY = 250


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A failure of a case, or (without a case) of the server."""

    verdict: str
    case: Case | None
    message: str
    logged: str = ""
    """The traceback in the server's log, if any."""

    @property
    def cause(self) -> str:
        """Key for grouping similar failures: the verdict and the start of the message, without variable parts."""
        if self.verdict in ("memory address", "long message"):
            return self.verdict
        return f"{self.verdict}: {_VARYING.sub('_', self.message)[:80]}"


_VARYING = re.compile(r"0x[0-9a-f]+|'[^']*'|\"[^\"]*\"|\[[^\]]*\]|-?\d[\d.e+-]*")


@dataclass(kw_only=True, slots=True)
class Report:
    """The results of a run."""

    answers: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Number of answers by kind of case and status."""
    failures: list[Failure] = field(default_factory=list)
    triton_errors: int = 0
    """Number of internal errors raised by Triton itself."""
    slow: list[tuple[float, Case]] = field(default_factory=list)
    probes: int = 0
    seconds: float = 0.0
    before: dict[str, Usage] = field(default_factory=dict)
    after: dict[str, Usage] = field(default_factory=dict)

    @property
    def cases(self) -> int:
        return self.answers.total()

    def table(self) -> Table:
        """Tabulate the cases and their answers by kind."""
        verdicts = Counter(failure.verdict for failure in self.failures)
        named = {name: verdicts.pop(name, 0) for name in ("crash", "hang", "internal")}
        title = (
            f"{self.cases} cases in {self.seconds:.0f} s, {self.probes} health probes; "
            f"crashes: {named['crash']}, hangs: {named['hang']}, internal errors: {named['internal']}, "
            f"other failures: {verdicts.total()}; internal errors of Triton itself: {self.triton_errors}; "
            f"slower than {SLOW_S:g} s: {len(self.slow)}"
        )
        shown = Table("kind", "cases", "answers", title=title, title_justify="left")
        for kind in sorted({kind for kind, _ in self.answers}):
            statuses = {status: count for (own, status), count in self.answers.most_common() if own == kind}
            parts = ", ".join(f"{status} {count}" for status, count in statuses.items())
            shown.add_row(kind, str(sum(statuses.values())), parts)
        return shown

    def causes(self) -> str:
        """Describe each group of similar failures: how many, the shortest case, and the indices of others."""
        alike: dict[str, list[Failure]] = {}
        for failure in self.failures:
            alike.setdefault(failure.cause, []).append(failure)
        lines = []
        for failures in sorted(alike.values(), key=len, reverse=True):
            shortest = min(failures, key=lambda failure: len(str(failure.case)))
            indices = sorted({failure.case.index for failure in failures if failure.case is not None})
            lines += [
                f"FAILED {len(failures)} x {shortest.verdict}: {shortest.message[:500]}",
                f"    {str(shortest.case or 'the server')[:700]}",
                *(f"    log: {line}" for line in shortest.logged.splitlines()[-6:]),
                f"    --only {' '.join(map(str, indices[:12]))}",
            ]
        return "\n".join(lines)

    def print(self, console: Console) -> None:
        console.print(self.table())
        if self.before and self.after:
            console.print(processes.table(self.before, self.after))
        for seconds, case in sorted(self.slow, key=lambda pair: -pair[0])[:10]:
            console.print(f"{seconds:.1f} s: {case}"[:400], markup=False, highlight=False)
        console.print(self.causes(), markup=False, highlight=False, soft_wrap=True)


class Log:
    """The server's log file and the position up to which it has been read."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w", encoding="utf-8")
        self._path, self._offset = path, 0

    def tracebacks(self) -> str:
        """Return what was logged since the last call, starting at the first traceback."""
        with self._path.open(encoding="utf-8", errors="replace") as text:
            text.seek(self._offset)
            new = text.read()
            self._offset = text.tell()
        _, found, rest = new.replace("\\n", "\n").partition("Traceback (most recent call last)")
        return found + rest


class Harness:
    """A running server with connections to it, health probes, and a way to restart it after a crash.

    Args:
        start: starts a new server after a crash; if None, the first crash ends the run.
    """

    def __init__(
        self,
        server: Server,
        targets: Sequence[Target],
        *,
        deadline: float = DEADLINE_S,
        start: Callable[[], Server] | None = None,
        log: Log | None = None,
    ) -> None:
        self.server, self.targets, self.log = server, targets, log
        self.deadline, self._start = deadline, start
        self._pictures: dict[str, Any] = {}
        self._connect()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.connections.close()

    def _connect(self) -> None:
        self.connections = Connections(self.server.grpc_address, self.server.http_address, self.deadline)
        self.processes = processes.processes(self.server)

    def ended(self) -> list[str]:
        """Name the server processes that have ended or been replaced since the last start."""
        return processes.ended(self.processes)

    def revive(self) -> bool:
        """Restart the server; return False if there is no way to."""
        if self._start is None:
            return False
        self.connections.close()
        self.server.kill()
        self.server = self._start()
        self._connect()
        return True

    def probe(self) -> str:
        """Generate a known picture with each bundle; return a description of the first problem, or an empty string."""
        for target in self.targets:
            try:
                keywords = as_keywords(valid.small(target), target)
                picture = np.asarray(self.connections.client.generate(model=target.bundle, **keywords).images[0])
            except Exception as error:
                return f"no picture of {target.bundle}: {type(error).__name__}: {error}"
            first = self._pictures.setdefault(target.bundle, picture)
            if np.abs(first.astype(int) - picture).max() > SAME_LEVELS:
                return f"the picture of {target.bundle} has changed"
        return ""

    def warm_up(self) -> None:
        """Run one request per task and the largest ones, so that their memory counts as part of the server's."""
        rng = Random(0)
        for target in self.targets:
            limits = target.capabilities["limits"]
            largest = {"height": [limits["height"][1]], "width": [limits["width"][1]], "num_inference_steps": [1]}
            requests = [maker(rng, target) for maker in valid.request_kinds(target)]
            requests += [largest | {"num_images_per_prompt": [limits["rows"]]}]
            if target.capabilities["video"]:
                requests += [largest | {"num_frames": [min(limits["frames"][1], 16)]}]
            for request in requests * 2:
                given = valid.small(target) | request | {"timeout": [self.deadline]}
                inputs = tensors(target.pipeline, given)
                Unary(data=message(target.pipeline.name, inputs).SerializeToString()).send(self.connections)
                Stream(data=(message(target.stream.name, inputs).SerializeToString(),)).send(self.connections)

    def usage(self) -> dict[str, Usage]:
        """Measure usage after the server has released its last responses.

        Triton keeps the buffers of large requests, and returns them to the system only while handling smaller ones.
        """
        target = self.targets[0]
        small = tensors(target.pipeline, valid.small(target))
        refused = small | {"num_inference_steps": tensor("INT32", [0])}
        malformed = small | {"seed": Tensor(dtype="INT64", shape=(5,), data=b"")}
        for inputs in (refused, malformed) * SMALL_REQUESTS:
            Unary(data=message(target.pipeline.name, inputs).SerializeToString()).send(self.connections)
        time.sleep(SETTLE_S)
        return processes.usage(self.processes)


def run(harness: Harness, cases: Iterable[Case], *, progress: Callable[[str], None] = lambda line: None) -> Report:
    """Run `cases` and report; measuring usage before and after is up to the caller."""
    report, start, since = Report(), time.monotonic(), 0
    _check(harness, report, None)
    for number, case in enumerate(cases, 1):
        answer = case.sendable.send(harness.connections)
        report.answers[case.kind, answer.status] += 1
        report.triton_errors += is_triton_error(answer)
        if answer.seconds > SLOW_S:
            report.slow.append((answer.seconds, case))
        known, since = len(report.failures), since + 1
        alive = _record(harness, report, case, answer)
        if alive and (since >= PROBE_EVERY or len(report.failures) > known):
            alive, since = _check(harness, report, case), 0
        report.seconds = time.monotonic() - start
        if number % PROGRESS_EVERY == 0:
            progress(f"{number} cases, {len(report.failures)} failures, {report.seconds:.0f} s")
        if not alive and not harness.revive():
            break
    if not harness.ended():
        _check(harness, report, None)
    report.seconds = time.monotonic() - start
    return report


def _record(harness: Harness, report: Report, case: Case, answer: Answer) -> bool:
    """Record failures seen in the answer, the processes and the log; return whether the server is still running."""
    problem = verdict(case, answer, harness.deadline)
    message = f"{answer.status} after {answer.seconds:.1f} s: {answer.message}"
    if ended := harness.ended():
        report.failures.append(Failure(verdict="crash", case=case, message=f"{', '.join(ended)} ended; {message}"))
        return False
    logged = harness.log.tracebacks() if harness.log else ""
    if problem or logged:
        failure = Failure(verdict=problem or "traceback in the log", case=case, message=message, logged=logged)
        report.failures.append(failure)
    return True


def _check(harness: Harness, report: Report, case: Case | None) -> bool:
    """Probe the server's health, record a failure, and return whether it is healthy."""
    report.probes += len(harness.targets)
    problem = harness.probe()
    if problem:
        message = f"{problem} (after this case or one shortly before)"
        report.failures.append(Failure(verdict="unhealthy", case=case, message=message))
    return not problem


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
