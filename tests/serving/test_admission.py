"""The waiting line: when jobs begin, and who is refused with which hint."""

from __future__ import annotations

import pytest

from imprompt import _errors as client_errors
from imprompt_serving.denoiser.admission import Load, check_room, starts
from imprompt_serving.denoiser.policy import START_PATIENCE
from imprompt_serving.errors import Overloaded
from imprompt_serving.specs import CallRows, Limits

STEPS = 10
JOB = Load(2, STEPS)


def test_jobs_begin_at_once_as_long_as_a_call_has_room() -> None:
    assert starts([JOB], [JOB, JOB, JOB], CallRows(8)) == [0, 0, 0]


def test_jobs_begin_when_those_before_them_have_ended() -> None:
    assert starts([Load(2, 4), Load(6, 7)], [JOB, JOB, Load(8, 1)], CallRows(8)) == [4, 7, 17]


def test_a_job_of_more_rows_than_a_call_takes_several_calls_a_step() -> None:
    assert starts([], [Load(20, STEPS), JOB], CallRows(8)) == [0, 3 * STEPS]


@pytest.mark.parametrize(("bucketed", "ticks"), [(False, 10), (True, 12)])
def test_jobs_that_take_turns_end_later(bucketed: bool, ticks: int) -> None:
    """Nine rows are calls of eight where they are padded: ten steps of all of them take more than ten."""
    running = [Load(1, STEPS)] * 9
    assert starts(running, [Load(8, STEPS)], CallRows(16, bucketed)) == [ticks]


def check(waiting: int, *, running: int = 4, tick_seconds: float = 1.0, rows: int = 8, seconds: float = 60.0) -> None:
    limits = Limits(waiting_rows=rows, waiting_seconds=seconds)
    check_room(JOB, [JOB] * running, [JOB] * waiting, call_rows=CallRows(8), tick_seconds=tick_seconds, limits=limits)


def test_room_in_the_line() -> None:
    check(waiting=3)


def test_a_full_line_refuses_by_rows() -> None:
    with pytest.raises(Overloaded, match=r"10 rows would wait, at most 8 may; retry in 10\.0 s") as refused:
        check(waiting=4)
    assert refused.value.reason == "rows"


def test_a_slow_line_refuses_by_seconds() -> None:
    with pytest.raises(Overloaded, match=r"about 80 seconds to wait, at most 60 are allowed; retry in 20\.0 s"):
        check(waiting=4, rows=1000, tick_seconds=4.0)


def test_shapes_take_turns() -> None:
    """Eight jobs of sizes of their own wait for each other, though each would have room in a call of its size."""
    others = [Load(2, STEPS, f"size {index}") for index in range(7)]
    with pytest.raises(Overloaded, match=r"about 160 seconds to wait"):
        check_room(
            Load(2, STEPS, "mine"),
            [Load(8, STEPS, "mine")],
            others[:1],
            call_rows=CallRows(8),
            tick_seconds=8.0,
            limits=Limits(waiting_seconds=60.0),
        )
    with pytest.raises(Overloaded, match=rf"about {START_PATIENCE * 4} seconds to wait"):
        check_room(
            Load(2, STEPS, "mine"),
            others,
            [JOB],
            call_rows=CallRows(8),
            tick_seconds=4.0,
            limits=Limits(waiting_seconds=60.0),
        )


def test_an_empty_line_takes_whatever_comes() -> None:
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
