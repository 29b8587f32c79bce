"""Soak tests: thousands of refused streams and of canceled calls, while a regular caller keeps generating."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random

from rich.console import Console

from fuzz import processes, valid
from fuzz.processes import Usage
from fuzz.runner import Harness
from fuzz.tensors import message, tensors
from fuzz.transports import Answer, Sdk, Sendable, Stream, Unary

CALLERS = 4
"""Number of callers that cancel calls at the same time."""
LONGEST_S = 0.3
"""Longest time until a caller cancels; a picture of `_STEPS` takes longer."""
_STEPS = 60
_PAUSE_S = 0.2
"""Pause of the regular caller between pictures."""


@dataclass(kw_only=True, slots=True)
class Result:
    """The result of a soak test."""

    title: str
    statuses: Counter[str] = field(default_factory=Counter)
    pictures: int = 0
    """Number of pictures that the regular caller received meanwhile."""
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    before: dict[str, Usage] = field(default_factory=dict)
    after: dict[str, Usage] = field(default_factory=dict)

    def print(self, console: Console) -> None:
        shown = processes.table(self.before, self.after)
        counts = ", ".join(f"{status} {count}" for status, count in self.statuses.most_common())
        shown.title = f"{self.title} in {self.seconds:.0f} s: {counts}; {self.pictures} pictures for a regular caller"
        console.print(shown)
        for failure in self.failures:
            console.print(f"FAILED {failure}"[:600], markup=False, highlight=False, soft_wrap=True)


def refusals(harness: Harness, count: int) -> Result:
    """Send `count` streams in sequence with the SDK, each with an invalid number of steps."""
    bundle = harness.targets[0].bundle
    refused = Sdk(method="stream", keywords={"model": bundle, "prompt": "a", "num_inference_steps": 0})
    with _observed(harness, f"{count} refused streams") as result:
        for _ in range(count):
            answer = refused.send(harness.connections)
            result.statuses[answer.status] += 1
            if answer.status != "InvalidRequest":
                result.failures.append(f"a refused stream: {answer}")
                if harness.ended():
                    break
    return result


def cancels(harness: Harness, count: int, *, before: dict[str, Usage] | None = None, seed: int = 0) -> Result:
    """Send `count` calls, both unary and streams, whose callers cancel at random times.

    Args:
        before: the usage of the server, if it has just been measured, which takes `SETTLE_S`.
    """
    with _observed(harness, f"{count} cancellations by {CALLERS} callers", before) as result:
        rng, lock = Random(seed), threading.Lock()
        calls = iter([_canceled(harness, rng) for _ in range(count)])

        def leave() -> None:
            while not harness.ended():
                with lock:
                    call = next(calls, None)
                if call is None:
                    return
                _note(result, lock, call.send(harness.connections))

        callers = [threading.Thread(target=leave) for _ in range(CALLERS)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    return result


def _note(result: Result, lock: threading.Lock, answer: Answer) -> None:
    with lock:
        result.statuses[answer.status] += 1
        # Before the caller cancels, the picture may be ready, or the server full of jobs that it has yet to drop.
        if answer.status not in ("LEFT", "OK", "UNAVAILABLE", "CANCELLED"):
            result.failures.append(f"a canceled call: {answer}")


def _canceled(harness: Harness, rng: Random) -> Sendable:
    """Build a long request whose caller cancels within `LONGEST_S`."""
    target = rng.choice(harness.targets)
    given = valid.small(target, rng.randrange(2**31)) | {"num_inference_steps": [_STEPS]}
    after = rng.random() * LONGEST_S
    if rng.random() < 0.5:
        data = message(target.pipeline.name, tensors(target.pipeline, given)).SerializeToString()
        return Unary(data=data, leave_after=after)
    return Stream(
        data=(message(target.stream.name, tensors(target.stream, given)).SerializeToString(),), leave_after=after
    )


@contextmanager
def _observed(harness: Harness, title: str, before: dict[str, Usage] | None = None) -> Iterator[Result]:
    """Measure usage before and after, while a regular caller checks that its pictures stay the same."""
    result, done = Result(title=title, before=before or harness.usage()), threading.Event()

    def ask() -> None:
        while not done.wait(_PAUSE_S):
            wrong = harness.probe()
            result.pictures += not wrong
            if wrong:
                result.failures.append(wrong)

    start, ordinary = time.monotonic(), threading.Thread(target=ask)
    ordinary.start()
    try:
        yield result
    finally:
        done.set()
        ordinary.join()
        result.seconds = time.monotonic() - start
    if gone := harness.ended():
        result.failures.append(f"{', '.join(gone)} ended")
    result.after = harness.usage()
