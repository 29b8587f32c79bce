"""The loop keeps pace with a device that computes asynchronously, and reports what the device has finished."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from imprompt_serving.denoiser import answers as answers_module
from imprompt_serving.denoiser.answers import Answers, AnswerThreads, Channel, Listener
from imprompt_serving.denoiser.loop import TICKS_IN_FLIGHT, Denoiser
from imprompt_serving.denoiser.meter import Meter
from imprompt_serving.errors import Cancelled, RequestError
from imprompt_serving.specs import CallRows
from serving.test_loop import WAIT_S, FakeBatcher, FakeJob
from serving.test_loop import Answers as Told


class Device:
    """A denoiser whose ticks are launched at once, and complete when the test says so."""

    def __init__(self) -> None:
        self.launched: list[list[tuple[str, int]]] = []
        self.failure: Exception | None = None
        self._batcher: Any = FakeBatcher()
        self.waited: list[str] = []
        """Names of the threads that waited, without their numbers."""
        self._turns = threading.Semaphore(0)
        self._changed = threading.Condition()
        self.meter = SecondsMeter()
        self.denoiser = Denoiser(
            self._predict, self._batcher, CallRows(8), meter=self.meter, record_launch=lambda: self._wait
        )

    def _predict(self, parts: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with self._changed:
            self.launched.append(self._batcher.parts)
            self._changed.notify_all()
        return inputs["sample"]

    def _wait(self) -> None:
        self.waited.append(threading.current_thread().name.partition("_")[0])
        assert self._turns.acquire(timeout=WAIT_S)
        if self.failure is not None:
            raise self.failure

    def complete(self, ticks: int = 1) -> None:
        self._turns.release(ticks)

    def wait_for_launches(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.launched) >= count, WAIT_S)


class SecondsMeter(Meter):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def ticked(self, rows: int, seconds: float) -> None:
        self.seconds.append(seconds)

    def counts(self, ticks: int) -> bool:
        return len(self.seconds) == ticks


@pytest.fixture
def device() -> Iterator[Device]:
    made = Device()
    yield made
    made.complete(100_000)
    made.denoiser.stop()


def submit(device: Device, job: Any) -> Told:
    told = Told()
    device.denoiser.submit(job, told)
    return told


def soon(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_the_number_of_ticks_in_flight_is_limited(device: Device) -> None:
    submit(device, FakeJob("a", steps=10))
    for complete in range(6):
        device.wait_for_launches(complete + TICKS_IN_FLIGHT)
        time.sleep(0.02)  # enough for one more
        assert len(device.launched) == complete + TICKS_IN_FLIGHT
        device.complete()


def test_a_new_job_joins_within_two_ticks(device: Device) -> None:
    submit(device, FakeJob("a", steps=10))
    device.wait_for_launches(2)
    submit(device, FakeJob("b"))
    device.complete()
    device.wait_for_launches(3)
    assert device.launched[2] == [("a", 2), ("b", 2)]


def test_a_separate_thread_waits_once_for_each_tick(device: Device) -> None:
    """The launcher and the thread that accepts jobs never wait for the device."""
    told = submit(device, FakeJob("a", steps=20))
    device.complete(20)
    assert told.final == "finished"
    assert device.waited == ["device"] * 20


def test_progress_and_the_result_are_reported_once_the_device_has_finished_them(device: Device) -> None:
    told = submit(device, FakeJob("a", steps=3))
    device.wait_for_launches(2)
    time.sleep(0.02)
    assert told.steps == []
    device.complete()
    soon(lambda: told.steps == [1])
    device.wait_for_launches(3)
    time.sleep(0.02)
    assert not told.finals
    device.complete(2)
    assert told.final == "finished"
    assert told.steps == [1, 2]


def test_a_cancelled_job_is_answered_at_once_and_leaves_the_device_within_two_ticks(device: Device) -> None:
    told = submit(device, FakeJob("a", steps=10**6))
    device.wait_for_launches(2)
    device.denoiser.cancel("a")
    assert isinstance(told.final, Cancelled)
    device.complete(100)
    time.sleep(0.05)
    assert len(device.launched) == 2


def test_measured_seconds_are_those_of_the_device(device: Device) -> None:
    submit(device, FakeJob("a", steps=4))
    for _ in range(4):
        time.sleep(0.05)
        device.complete()
        soon(partial(device.meter.counts, len(device.meter.seconds) + 1))
    assert all(0.04 < seconds < 0.5 for seconds in device.meter.seconds)


def test_a_device_error_fails_the_jobs_of_its_tick(device: Device) -> None:
    device.failure = RuntimeError("out of memory")
    told = submit(device, FakeJob("a"))
    device.complete(100)
    assert "out of memory" in str(told.final)
    device.failure = None
    assert submit(device, FakeJob("b")).final == "finished"


def test_the_answers_of_a_job_stay_in_order() -> None:
    told: list[int] = []
    ended = threading.Event()
    threads = AnswerThreads(4)
    listener = Listener(lambda step, *_: told.append(step), lambda job: ended.set(), lambda error: None)
    answers = Answers(listener, threads, Meter())
    for step in range(500):
        answers.progress(step, 500, None, lambda error: None)
    answers.finish(FakeJob("a"))
    assert ended.wait(WAIT_S)
    assert told == list(range(500))
    threads.close(WAIT_S)


def test_closing_sends_queued_answers() -> None:
    threads, release, told = AnswerThreads(2), threading.Event(), list[str]()
    listener = Listener(lambda *_: bool(release.wait(WAIT_S)), lambda _: None, lambda error: told.append(str(error)))
    answers = Answers(listener, threads, Meter())
    answers.progress(1, 2, None, lambda error: None)
    answers.fail(RequestError("stopping"))
    threading.Timer(0.1, release.set).start()
    threads.close(WAIT_S)
    assert told == ["stopping"]


def test_hanging_sends_do_not_block_others() -> None:
    threads, release = AnswerThreads(2, send_limit=0.05), threading.Event()
    hung = [
        Answers(Listener(lambda *_: None, lambda _: None, lambda _: bool(release.wait(WAIT_S))), threads, Meter())
        for _ in range(2)
    ]
    for answers in hung:
        answers.fail(RequestError("taken by nobody"))
    time.sleep(0.1)
    sent = threading.Event()
    Answers(Listener(lambda *_: None, lambda _: sent.set(), lambda _: None), threads, Meter()).finish(FakeJob("a"))
    assert sent.wait(WAIT_S / 2)
    release.set()
    threads.close(WAIT_S)


def test_a_thread_that_recovers_may_be_replaced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers_module, "_MAX_REPLACED", 1)
    threads = AnswerThreads(1, send_limit=0.0)
    for _ in range(3):
        hanging, release, sent = list[threading.Thread](), threading.Event(), threading.Event()

        def hang(hanging: list[threading.Thread] = hanging, release: threading.Event = release) -> None:
            hanging.append(threading.current_thread())
            release.wait(WAIT_S)

        threads.send(Channel(), hang)
        soon(lambda hanging=hanging: bool(hanging))  # type: ignore[misc]
        threads.send(Channel(), sent.set)
        assert sent.wait(WAIT_S / 2)
        release.set()
        hanging[0].join(WAIT_S)
        assert not hanging[0].is_alive()
    threads.close(WAIT_S)
