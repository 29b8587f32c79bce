"""Thousands of refused streams, and of calls that are cancelled midway, beside an ordinary caller."""

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
from fuzz.runner import Attacked
from fuzz.tensors import message, tensors
from fuzz.transports import Answer, Sdk, Sendable, Stream, Unary

CALLERS = 4
"""That cancel, at the same time."""
LONGEST_S = 0.3
"""Until a caller leaves; a picture of `_STEPS` takes longer."""
_STEPS = 60
_PAUSE_S = 0.2
"""Of the ordinary caller, between two pictures."""


@dataclass(kw_only=True, slots=True)
class Result:
    """What a soak saw."""

    title: str
    statuses: Counter[str] = field(default_factory=Counter)
    pictures: int = 0
    """That the ordinary caller got meanwhile."""
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    before: dict[str, Usage] = field(default_factory=dict)
    after: dict[str, Usage] = field(default_factory=dict)

    def print(self, console: Console) -> None:
        shown = processes.table(self.before, self.after)
        counts = ", ".join(f"{status} {count}" for status, count in self.statuses.most_common())
        shown.title = f"{self.title} in {self.seconds:.0f} s: {counts}; {self.pictures} ordinary pictures beside them"
        console.print(shown)
        for failure in self.failures:
            console.print(f"FAILED {failure}"[:600], markup=False, highlight=False, soft_wrap=True)


def refusals(attacked: Attacked, count: int) -> Result:
    """`count` streams of the SDK in a row, each refused for its number of steps."""
    bundle = attacked.targets[0].bundle
    refused = Sdk(method="stream", keywords={"model": bundle, "prompt": "a", "num_inference_steps": 0})
    with _observed(attacked, f"{count} refused streams") as result:
        for _ in range(count):
            answer = refused.send(attacked.connections)
            result.statuses[answer.status] += 1
            if answer.status != "InvalidRequest":
                result.failures.append(f"a refused stream: {answer}")
                if attacked.ended():
                    break
    return result


def cancels(attacked: Attacked, count: int, *, before: dict[str, Usage] | None = None, seed: int = 0) -> Result:
    """`count` calls, unary ones and streams, whose callers leave at random moments.

    Args:
        before: the usage of the server, where it has just been measured: that takes `SETTLE_S`.
    """
    with _observed(attacked, f"{count} cancels by {CALLERS} callers", before) as result:
        rng, lock = Random(seed), threading.Lock()
        calls = iter([_cancelled(attacked, rng) for _ in range(count)])

        def leave() -> None:
            while not attacked.ended():
                with lock:
                    call = next(calls, None)
                if call is None:
                    return
                _note(result, lock, call.send(attacked.connections))

        callers = [threading.Thread(target=leave) for _ in range(CALLERS)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    return result


def _note(result: Result, lock: threading.Lock, answer: Answer) -> None:
    with lock:
        result.statuses[answer.status] += 1
        # A picture may be ready, or the server full of jobs that it is about to drop, before the caller leaves.
        if answer.status not in ("LEFT", "OK", "UNAVAILABLE", "CANCELLED"):
            result.failures.append(f"a caller who leaves: {answer}")


def _cancelled(attacked: Attacked, rng: Random) -> Sendable:
    """A long picture whose caller leaves within `LONGEST_S`."""
    target = rng.choice(attacked.targets)
    given = valid.small(target, rng.randrange(2**31)) | {"num_inference_steps": [_STEPS]}
    after = rng.random() * LONGEST_S
    if rng.random() < 0.5:
        data = message(target.pipeline.name, tensors(target.pipeline, given)).SerializeToString()
        return Unary(data=data, leave_after=after)
    return Stream(
        data=(message(target.stream.name, tensors(target.stream, given)).SerializeToString(),), leave_after=after
    )


@contextmanager
def _observed(attacked: Attacked, title: str, before: dict[str, Usage] | None = None) -> Iterator[Result]:
    """Usage before and after, and an ordinary caller meanwhile, whose pictures must stay the same."""
    result, done = Result(title=title, before=before or attacked.usage()), threading.Event()

    def ask() -> None:
        while not done.wait(_PAUSE_S):
            wrong = attacked.probe()
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
    if gone := attacked.ended():
        result.failures.append(f"{', '.join(gone)} ended")
    result.after = attacked.usage()
