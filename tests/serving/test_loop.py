"""The loop of the denoiser, with networks that tests pause and resume: jobs that join, leave, and fail."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from imprompt_serving.denoiser.admission import Load
from imprompt_serving.denoiser.answers import Listener
from imprompt_serving.denoiser.batch import RowSlice
from imprompt_serving.denoiser.loop import Denoiser
from imprompt_serving.denoiser.meter import Meter, Population
from imprompt_serving.denoiser.policy import CANARY_PRIORITY, TURN_COST
from imprompt_serving.errors import Cancelled, InvalidRequest, Overloaded, RequestError
from imprompt_serving.specs import CallRows, Limits

WAIT_S = 10.0


class FakeJob:
    """A job with the members that the loop uses."""

    def __init__(
        self,
        id: str,
        *,
        rows: int = 2,
        steps: int = 3,
        key: str = "a",
        timeout: float | None = None,
        lora: dict[str, float] | None = None,
        priority: int = 5,
    ) -> None:
        self.id, self.rows, self.steps, self.batch_key = id, rows, steps, key
        self.loras = tuple(f"{name}={scale}" for name, scale in (lora or {}).items())
        self.request = SimpleNamespace(
            settings=SimpleNamespace(priority=priority, progress_every=1),
            reports_progress=True,
            timeout=timeout,
        )
        self.deadline = None if timeout is None else time.monotonic() + timeout
        self.started: float | None = None
        self.last_served_tick = self.step = self.filled = 0
        self.predicted = None
        self.frames = 1
        self.broken: Exception | None = None

    @property
    def pending(self) -> int:
        return self.rows - self.filled

    @property
    def load(self) -> Load:
        return Load(self.rows, self.steps - self.step)

    @property
    def done(self) -> bool:
        return self.step == self.steps

    def add_output_rows(self, rows: torch.Tensor) -> None:
        if self.broken is not None:
            raise self.broken
        self.filled += len(rows)
        if not self.pending:
            self.step, self.filled = self.step + 1, 0


class FakeBatcher:
    """Makes rows of ones, and passes on the ids of the jobs."""

    def inputs(self, parts: list[RowSlice]) -> dict[str, torch.Tensor]:
        self.parts = [(part.job.id, part.stop - part.start) for part in parts]
        return {"sample": torch.ones(sum(rows for _, rows in self.parts), 1)}

    def forget(self) -> None:
        pass


class Gate:
    """Networks that compute one call for each `open()`, and all calls after `open(None)`."""

    def __init__(self, batcher: FakeBatcher) -> None:
        self.batcher, self.calls = batcher, list[list[tuple[str, int]]]()
        self.poison: set[str] = set()
        self._turns, self._entered = threading.Semaphore(0), threading.Semaphore(0)
        self._free = False

    def open(self, calls: int | None = 1) -> None:
        self._free = calls is None
        self._turns.release(calls or 1000)

    def entered(self) -> None:
        """Wait until a call has arrived."""
        assert self._entered.acquire(timeout=WAIT_S)

    def __call__(self, parts: Sequence[RowSlice], inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        self._entered.release()
        if not self._free:
            assert self._turns.acquire(timeout=WAIT_S)
        self.calls.append(self.batcher.parts)
        if self.poison & {job_id for job_id, _ in self.batcher.parts}:
            raise ValueError("the engine does not like this one")
        return inputs["sample"]


class Answers(Listener):
    """Records the answers of a job."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.finals: list[object] = []
        self._ended = threading.Event()
        super().__init__(lambda step, *_: self.steps.append(step), self._end, self._end)

    def _end(self, what: Any) -> None:
        self.finals.append("finished" if not isinstance(what, Exception) else what)
        self._ended.set()

    @property
    def final(self) -> Any:
        assert self._ended.wait(WAIT_S), "no final answer"
        return self.finals[0]


class CountingMeter(Meter):
    def __init__(self) -> None:
        self.last = Population(0, 0, 0, 0)
        self.outcomes: list[str] = []
        self.refusals: list[str] = []
        self.ticks: list[int] = []

    def ticked(self, rows: int, seconds: float) -> None:
        self.ticks.append(rows)

    def population(self, population: Population) -> None:
        self.last = population

    def ended(self, outcome: str) -> None:
        self.outcomes.append(outcome)

    def refused(self, reason: str) -> None:
        self.refusals.append(reason)


class Rig:
    """A denoiser, and the gate of its networks."""

    def __init__(self, limits: Limits | None = None) -> None:
        batcher: Any = FakeBatcher()
        self.gate, self.meter = Gate(batcher), CountingMeter()
        self.denoiser = Denoiser(self.gate, batcher, CallRows(8), limits, self.meter)

    def submit(self, job: Any, **hooks: Callable[..., None]) -> Answers:
        answers = Answers()
        for name, hook in hooks.items():
            setattr(answers, name, hook)
        self.denoiser.submit(job, answers)
        return answers


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.gate.open(None)
    made.denoiser.stop()


def test_a_job_runs_to_its_end(rig: Rig) -> None:
    answers = rig.submit(FakeJob("a"))
    rig.gate.open(None)
    assert answers.final == "finished"
    assert answers.steps == [1, 2]
    assert rig.gate.calls == [[("a", 2)]] * 3
    assert rig.meter.last == Population(0, 0, 0, 0)


def test_jobs_with_different_loras_take_turns_of_several_ticks(rig: Rig) -> None:
    jobs = [FakeJob(name, steps=40, key=name, lora={name: 1.0}) for name in "ab"]
    answers = [rig.submit(job) for job in jobs]
    rig.gate.open(None)
    assert [answer.final for answer in answers] == ["finished"] * 2
    turns = [len(list(calls)) for _, calls in groupby(rig.gate.calls)]
    assert sum(turns) == 80
    # A call of two rows costs three; a job that has not started lets the other one go first for a while.
    assert turns[1:6] == [-(-TURN_COST // 3)] * 5


def test_a_job_joins_at_the_next_tick(rig: Rig) -> None:
    first = rig.submit(FakeJob("a"))
    rig.gate.entered()
    second = rig.submit(FakeJob("b", steps=1))
    rig.gate.open(None)
    assert (first.final, second.final) == ("finished", "finished")
    assert rig.gate.calls == [[("a", 2)], [("a", 2), ("b", 2)], [("a", 2)]]


def test_a_cancelled_job_leaves_at_the_next_tick(rig: Rig) -> None:
    gone, stays = rig.submit(FakeJob("a")), rig.submit(FakeJob("b"))
    rig.gate.entered()
    rig.denoiser.cancel("a")
    rig.gate.open(1)
    assert isinstance(gone.final, Cancelled)
    rig.gate.open(None)
    assert stays.final == "finished"
    assert all(("a", 2) not in call for call in rig.gate.calls[1:])


def test_a_waiting_job_is_cancelled_within_a_tick(rig: Rig) -> None:
    rig.submit(FakeJob("large", rows=8, steps=50))
    rig.gate.entered()
    waiting = rig.submit(FakeJob("b", rows=8))
    rig.denoiser.cancel("b")
    rig.gate.open(1)
    assert isinstance(waiting.final, Cancelled)
    assert waiting.steps == []
    assert rig.meter.last == Population(1, 8, 0, 0)


def test_a_deadline_ends_a_job_within_a_tick(rig: Rig) -> None:
    late, stays = rig.submit(FakeJob("a", timeout=0.05)), rig.submit(FakeJob("b"))
    rig.gate.entered()
    time.sleep(0.06)
    rig.gate.open(1)
    assert isinstance(late.final, Cancelled)
    assert "0.05 seconds" in str(late.final)
    rig.gate.open(None)
    assert stays.final == "finished"


def test_a_cancellation_may_arrive_before_its_job(rig: Rig) -> None:
    rig.denoiser.cancel("a")
    with pytest.raises(Cancelled):
        rig.denoiser.admit("a", Load(2, 3))
    with pytest.raises(Cancelled):
        rig.submit(FakeJob("a"))
    assert not rig.gate.calls


def test_cancelling_frees_a_reserved_place(rig: Rig) -> None:
    rig.denoiser.admit("a", Load(2, 3))
    assert rig.meter.last == Population(0, 0, 1, 2)
    rig.denoiser.cancel("a")
    rig.denoiser.admit("b", Load(2, 3))
    assert rig.meter.last == Population(0, 0, 1, 2)


def test_a_second_job_with_the_same_id_is_refused_and_takes_no_place(rig: Rig) -> None:
    first = rig.submit(FakeJob("a"))
    for _ in range(2):
        with pytest.raises(RequestError, match="a job with the id a is already active"):
            rig.submit(FakeJob("a"))
        with pytest.raises(RequestError, match="a job with the id a is already active"):
            rig.denoiser.admit("a", Load(2, 3))
    rig.gate.open(None)
    assert first.final == "finished"
    assert rig.meter.last == Population(0, 0, 0, 0)


def test_an_engine_error_only_fails_the_job_that_causes_it(rig: Rig) -> None:
    rig.gate.poison.add("bad")
    answers = {name: rig.submit(FakeJob(name)) for name in ("a", "bad", "c")}
    rig.gate.open(None)
    assert (answers["a"].final, answers["c"].final) == ("finished", "finished")
    assert isinstance(answers["bad"].final, RequestError)
    assert "does not like" in str(answers["bad"].final)


@pytest.mark.parametrize("error", [ValueError("odd latents"), InvalidRequest("scheduler", "cannot step")])
def test_a_failing_step_only_fails_its_job(rig: Rig, error: Exception) -> None:
    bad: Any = FakeJob("bad")
    bad.broken = error
    good, failed = rig.submit(FakeJob("a")), rig.submit(bad)
    rig.gate.open(None)
    assert good.final == "finished"
    assert type(failed.final) is (InvalidRequest if isinstance(error, InvalidRequest) else RequestError)


def test_a_failing_listener_only_ends_its_job(rig: Rig) -> None:
    def fails(*_: object) -> None:
        raise OSError("nobody listens")

    deaf, other = rig.submit(FakeJob("a", steps=10**6), progress=fails), rig.submit(FakeJob("b"))
    unfinished = rig.submit(FakeJob("c"), finish=fails)
    rig.gate.open(None)
    assert "nobody listens" in str(deaf.final)
    assert "nobody listens" in str(unfinished.final)
    assert other.final == "finished"


def test_exactly_one_final_answer() -> None:
    """Also if a job finishes, is cancelled, and reaches its deadline at the same time, many times."""
    rig = Rig(Limits(waiting_rows=1000, waiting_seconds=1000.0))
    rig.gate.open(None)
    answers = []
    for index in range(200):
        answers.append(rig.submit(FakeJob(f"{index}", steps=2, timeout=0.002 if index % 3 else None)))
        if index % 2:
            rig.denoiser.cancel(f"{index}")
    for answer in answers:
        assert answer.final is not None
    rig.denoiser.stop()
    assert [len(answer.finals) for answer in answers] == [1] * 200
    assert len(rig.meter.outcomes) == 200


def test_jobs_are_freed_when_they_end(rig: Rig) -> None:
    finished, cancelled = FakeJob("a"), FakeJob("b", steps=10**6)
    references = [weakref.ref(finished), weakref.ref(cancelled)]
    answers = [rig.submit(finished), rig.submit(cancelled)]
    del finished, cancelled
    rig.gate.open(None)
    assert answers[0].final == "finished"
    rig.denoiser.cancel("b")
    assert isinstance(answers[1].final, Cancelled)
    end = time.monotonic() + WAIT_S
    while any(reference() for reference in references) and time.monotonic() < end:
        gc.collect()
        time.sleep(0.01)
    assert not any(reference() for reference in references)


def test_a_full_queue_refuses_at_once() -> None:
    rig = Rig(Limits(waiting_rows=4))
    try:
        first = rig.submit(FakeJob("a", rows=8))
        rig.gate.entered()
        accepted = [rig.submit(FakeJob("b")), rig.submit(FakeJob("c"))]
        with pytest.raises(Overloaded, match=r"retry in \d+\.\d s"):
            rig.submit(FakeJob("d"))
        assert rig.meter.refusals == ["rows"]
        rig.gate.open(None)
        assert [answer.final for answer in (first, *accepted)] == ["finished"] * 3
        assert rig.submit(FakeJob("d")).final == "finished"
    finally:
        rig.gate.open(None)
        rig.denoiser.stop()


def test_the_estimated_wait_is_that_of_recent_calls() -> None:
    """It stays short after many short calls: a job that waits for hundreds of them behind another is accepted."""
    rig = Rig(Limits(waiting_seconds=30))
    try:
        rig.gate.open(None)
        assert rig.submit(FakeJob("a", steps=100)).final == "finished"
        answers = [rig.submit(FakeJob(name, rows=8, steps=500)) for name in ("b", "c", "d")]
        assert [answer.final for answer in answers] == ["finished"] * 3
    finally:
        rig.denoiser.stop()


def test_a_canary_passes_a_full_queue_and_appears_in_no_metric() -> None:
    rig = Rig(Limits(waiting_rows=4))
    try:
        first = rig.submit(FakeJob("a", rows=8, steps=20))
        rig.gate.entered()
        waiting = [rig.submit(FakeJob("b")), rig.submit(FakeJob("c"))]
        before = rig.meter.last
        canary = rig.submit(FakeJob("canary", rows=1, steps=1, key="small", priority=CANARY_PRIORITY))
        assert rig.meter.last == before
        rig.gate.open(3)
        assert canary.final == "finished"
        assert not first.finals
        assert (rig.meter.outcomes, rig.meter.refusals) == ([], [])
        rig.gate.open(None)
        assert [answer.final for answer in (first, *waiting)] == ["finished"] * 3
        assert rig.gate.calls.index([("canary", 1)]) <= 2
        assert 1 not in rig.meter.ticks
    finally:
        rig.gate.open(None)
        rig.denoiser.stop()


def test_cancelled_jobs_take_no_room_in_the_queue() -> None:
    rig = Rig(Limits(waiting_rows=4))
    try:
        rig.submit(FakeJob("a", rows=8))
        rig.gate.entered()
        for index in range(100):  # all during one call
            left = rig.submit(FakeJob(f"{index}", rows=4))
            rig.denoiser.cancel(f"{index}")
        assert rig.meter.last == Population(1, 8, 0, 0)
        stays = rig.submit(FakeJob("b", rows=4))
        rig.gate.open(None)
        assert stays.final == "finished"
        assert isinstance(left.final, Cancelled)
    finally:
        rig.gate.open(None)
        rig.denoiser.stop()


def test_stopping_waits_no_longer_than_requested_for_a_hanging_call() -> None:
    rig = Rig()
    answers = rig.submit(FakeJob("a"))
    rig.gate.entered()
    began = time.monotonic()
    rig.denoiser.stop(0.1)
    assert time.monotonic() - began < WAIT_S / 2
    rig.gate.open(None)
    assert isinstance(answers.final, Overloaded)


def test_stopping_fails_waiting_jobs_and_ends_all_threads() -> None:
    before = set(threading.enumerate())
    rig = Rig()
    answers = rig.submit(FakeJob("a", steps=10**6))
    rig.gate.open(None)
    rig.denoiser.stop()
    assert isinstance(answers.final, Overloaded)
    assert set(threading.enumerate()) <= before
    with pytest.raises(Overloaded):
        rig.submit(FakeJob("b"))
