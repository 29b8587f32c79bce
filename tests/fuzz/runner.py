"""Runs cases one after another, looks after the server between them, and counts."""

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
from fuzz.verdicts import is_tritons, verdict
from imprompt_serving.launcher import Server

DEADLINE_S = 90.0
"""For one case. Far above what any takes, also on a busy machine: a case that needs it hangs."""
SLOW_S = 5.0
PROBE_EVERY = 25
"""Cases between two ordinary pictures."""
SAME_LEVELS = 2
"""Levels of 255 by which a picture may differ from the first one: it may share a batch with a job that is leaving."""
SETTLE_S = 7.0
"""The server holds what it has sent for 5 s."""
SMALL_REQUESTS = 100
PROGRESS_EVERY = 250


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """What went wrong with which case; without a case it is the server that is not as it was."""

    verdict: str
    case: Case | None
    message: str
    logged: str = ""
    """From the server's log."""

    @property
    def cause(self) -> str:
        """The same for failures that look alike: the verdict and the start of the message, without what varies."""
        if self.verdict in ("memory address", "long message"):
            return self.verdict
        return f"{self.verdict}: {_VARYING.sub('_', self.message)[:80]}"


_VARYING = re.compile(r"0x[0-9a-f]+|'[^']*'|\"[^\"]*\"|\[[^\]]*\]|-?\d[\d.e+-]*")


@dataclass(kw_only=True, slots=True)
class Report:
    """Counts of a run."""

    answers: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By kind of case and status."""
    failures: list[Failure] = field(default_factory=list)
    tritons: int = 0
    """Internal errors of Triton's own."""
    slow: list[tuple[float, Case]] = field(default_factory=list)
    probes: int = 0
    seconds: float = 0.0
    before: dict[str, Usage] = field(default_factory=dict)
    after: dict[str, Usage] = field(default_factory=dict)

    @property
    def cases(self) -> int:
        return self.answers.total()

    def table(self) -> Table:
        """Cases by kind, and what they ended with."""
        verdicts = Counter(failure.verdict for failure in self.failures)
        named = {name: verdicts.pop(name, 0) for name in ("crash", "hang", "internal")}
        title = (
            f"{self.cases} cases in {self.seconds:.0f} s, {self.probes} ordinary pictures between them; "
            f"crashes: {named['crash']}, hangs: {named['hang']}, internal errors: {named['internal']}, "
            f"other failures: {verdicts.total()}; internal errors of Triton's own: {self.tritons}; "
            f"slower than {SLOW_S:g} s: {len(self.slow)}"
        )
        shown = Table("kind", "cases", "answers", title=title, title_justify="left")
        for kind in sorted({kind for kind, _ in self.answers}):
            statuses = {status: count for (own, status), count in self.answers.most_common() if own == kind}
            parts = ", ".join(f"{status} {count}" for status, count in statuses.items())
            shown.add_row(kind, str(sum(statuses.values())), parts)
        return shown

    def causes(self) -> str:
        """Failures that look alike together: how many, the shortest case of them, and where others are."""
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
    """The server's log in a file; knows how far it was read."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w", encoding="utf-8")
        self._path, self._offset = path, 0

    def tracebacks(self) -> str:
        """What was written since the last call, from its first traceback on."""
        with self._path.open(encoding="utf-8", errors="replace") as text:
            text.seek(self._offset)
            new = text.read()
            self._offset = text.tell()
        _, found, rest = new.replace("\\n", "\n").partition("Traceback (most recent call last)")
        return found + rest


class Attacked:
    """A running server with connections and an ordinary picture of each bundle, made anew when the server has ended.

    Args:
        start: starts another one; without it the first crash is the end.
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
        """Processes of the server that ended, or were replaced, since it was started or revived."""
        return processes.ended(self.processes)

    def revive(self) -> bool:
        """Start the server again, if there is a way to."""
        if self._start is None:
            return False
        self.connections.close()
        self.server.kill()
        self.server = self._start()
        self._connect()
        return True

    def probe(self) -> str:
        """Ask each bundle for its ordinary picture; what is wrong with it, or nothing."""
        for target in self.targets:
            try:
                keywords = as_keywords(valid.small(target), target)
                picture = np.asarray(self.connections.client.generate(model=target.bundle, **keywords).images[0])
            except Exception as error:
                return f"no picture of {target.bundle}: {type(error).__name__}: {error}"
            first = self._pictures.setdefault(target.bundle, picture)
            if np.abs(first.astype(int) - picture).max() > SAME_LEVELS:
                return f"another picture of {target.bundle} than at first"
        return ""

    def warm_up(self) -> None:
        """One request of each task, and the largest ones: what memory they take belongs to the server."""
        rng = Random(0)
        for target in self.targets:
            limits = target.capabilities["limits"]
            largest = {"height": [limits["height"][1]], "width": [limits["width"][1]], "num_inference_steps": [1]}
            requests = [maker(rng, target) for maker in valid.makers(target)]
            requests += [largest | {"num_images_per_prompt": [limits["rows"]]}]
            if target.capabilities["video"]:
                requests += [largest | {"num_frames": [min(limits["frames"][1], 16)]}]
            for request in requests * 2:
                given = valid.small(target) | request | {"timeout": [self.deadline]}
                inputs = tensors(target.pipeline, given)
                Unary(data=message(target.pipeline.name, inputs).SerializeToString()).send(self.connections)
                Stream(data=(message(target.stream.name, inputs).SerializeToString(),)).send(self.connections)

    def usage(self) -> dict[str, Usage]:
        """What the server holds once it has let go of its last answers.

        Triton keeps the buffers of large requests, and returns them to the system only as smaller ones follow.
        """
        target = self.targets[0]
        small = tensors(target.pipeline, valid.small(target))
        refused = small | {"num_inference_steps": tensor("INT32", [0])}
        malformed = small | {"seed": Tensor(dtype="INT64", shape=(5,), data=b"")}
        for inputs in (refused, malformed) * SMALL_REQUESTS:
            Unary(data=message(target.pipeline.name, inputs).SerializeToString()).send(self.connections)
        time.sleep(SETTLE_S)
        return processes.usage(self.processes)


def run(attacked: Attacked, cases: Iterable[Case], *, progress: Callable[[str], None] = lambda line: None) -> Report:
    """Send `cases`; the server's usage before and after is the caller's to measure."""
    report, start, since = Report(), time.monotonic(), 0
    _check(attacked, report, None)
    for number, case in enumerate(cases, 1):
        answer = case.sendable.send(attacked.connections)
        report.answers[case.kind, answer.status] += 1
        report.tritons += is_tritons(answer)
        if answer.seconds > SLOW_S:
            report.slow.append((answer.seconds, case))
        known, since = len(report.failures), since + 1
        alive = _judge(attacked, report, case, answer)
        if alive and (since >= PROBE_EVERY or len(report.failures) > known):
            alive, since = _check(attacked, report, case), 0
        report.seconds = time.monotonic() - start
        if number % PROGRESS_EVERY == 0:
            progress(f"{number} cases, {len(report.failures)} failures, {report.seconds:.0f} s")
        if not alive and not attacked.revive():
            break
    if not attacked.ended():
        _check(attacked, report, None)
    report.seconds = time.monotonic() - start
    return report


def _judge(attacked: Attacked, report: Report, case: Case, answer: Answer) -> bool:
    """Record what the answer, the processes and the log say; whether the server can go on."""
    wrong = verdict(case, answer, attacked.deadline)
    told = f"{answer.status} after {answer.seconds:.1f} s: {answer.message}"
    if gone := attacked.ended():
        report.failures.append(Failure(verdict="crash", case=case, message=f"{', '.join(gone)} ended; {told}"))
        return False
    logged = attacked.log.tracebacks() if attacked.log else ""
    if wrong or logged:
        report.failures.append(Failure(verdict=wrong or "traceback in the log", case=case, message=told, logged=logged))
    return True


def _check(attacked: Attacked, report: Report, case: Case | None) -> bool:
    """Ask for ordinary pictures; whether they came."""
    report.probes += len(attacked.targets)
    wrong = attacked.probe()
    if wrong:
        report.failures.append(
            Failure(verdict="unwell", case=case, message=f"{wrong} (by this case, or one shortly before)")
        )
    return not wrong


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
