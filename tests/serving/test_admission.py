"""Admission to the queue: when waiting jobs would start, and who is refused with which hint."""

from __future__ import annotations

import pytest

from imprompt import _errors as client_errors
from imprompt_serving.denoiser.admission import Load, check_room, start_ticks
from imprompt_serving.denoiser.policy import START_PATIENCE
from imprompt_serving.errors import Overloaded
from imprompt_serving.specs import CallRows, Limits

STEPS = 10
JOB = Load(2, STEPS)


def test_jobs_start_at_once_while_a_call_has_room() -> None:
    assert start_ticks([JOB], [JOB, JOB, JOB], CallRows(8)) == [0, 0, 0]


def test_jobs_start_when_earlier_ones_have_ended() -> None:
    assert start_ticks([Load(2, 4), Load(6, 7)], [JOB, JOB, Load(8, 1)], CallRows(8)) == [4, 7, 17]


def test_a_job_larger_than_a_call_takes_several_calls_per_step() -> None:
    assert start_ticks([], [Load(20, STEPS), JOB], CallRows(8)) == [0, 3 * STEPS]


@pytest.mark.parametrize(("bucketed", "ticks"), [(False, 10), (True, 12)])
def test_jobs_that_take_turns_take_longer(bucketed: bool, ticks: int) -> None:
    """Where calls are padded, nine rows run in calls of eight, so ten steps take more than ten calls."""
    running = [Load(1, STEPS)] * 9
    assert start_ticks(running, [Load(8, STEPS)], CallRows(16, bucketed)) == [ticks]


def check(waiting: int, *, running: int = 4, tick_seconds: float = 1.0, rows: int = 8, seconds: float = 60.0) -> None:
    limits = Limits(waiting_rows=rows, waiting_seconds=seconds)
    check_room(JOB, [JOB] * running, [JOB] * waiting, call_rows=CallRows(8), tick_seconds=tick_seconds, limits=limits)


def test_a_job_within_the_limits_is_accepted() -> None:
    check(waiting=3)


def test_a_full_queue_refuses_by_rows() -> None:
    with pytest.raises(Overloaded, match=r"10 rows would wait, the limit is 8\); retry in 10\.0 s") as refused:
        check(waiting=4)
    assert refused.value.reason == "rows"


def test_a_job_larger_than_the_queue_waits_for_all_others() -> None:
    limits = Limits(waiting_rows=8, waiting_seconds=60.0)
    with pytest.raises(Overloaded, match=r"14 rows would wait, the limit is 8\); retry in 10\.0 s"):
        check_room(Load(12, STEPS), [JOB] * 4, [JOB], call_rows=CallRows(8), tick_seconds=1.0, limits=limits)


def test_a_slow_queue_refuses_by_seconds() -> None:
    with pytest.raises(Overloaded, match=r"would be about 80 s, the limit is 60 s; retry in 20\.0 s"):
        check(waiting=4, rows=1000, tick_seconds=4.0)


def test_batch_keys_take_turns() -> None:
    """Eight jobs of different sizes wait for each other, although each would have a call to itself."""
    others = [Load(2, STEPS, f"size {index}") for index in range(7)]
    with pytest.raises(Overloaded, match=r"about 160 s"):
        check_room(
            Load(2, STEPS, "mine"),
            [Load(8, STEPS, "mine")],
            others[:1],
            call_rows=CallRows(8),
            tick_seconds=8.0,
            limits=Limits(waiting_seconds=60.0),
        )
    with pytest.raises(Overloaded, match=rf"about {START_PATIENCE * 4} s"):
        check_room(
            Load(2, STEPS, "mine"),
            others,
            [JOB],
            call_rows=CallRows(8),
            tick_seconds=4.0,
            limits=Limits(waiting_seconds=60.0),
        )


def test_an_empty_queue_accepts_any_job() -> None:
    check_room(
        Load(128, STEPS),
        [JOB] * 4,
        [],
        call_rows=CallRows(8),
        tick_seconds=100.0,
        limits=Limits(waiting_rows=1, waiting_seconds=1.0),
    )


def test_clients_understand_the_hint() -> None:
    with pytest.raises(Overloaded) as refused:
        check(waiting=4)
    assert client_errors.retry_hint(str(refused.value)) == 10.0
