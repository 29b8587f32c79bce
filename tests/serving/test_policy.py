"""The policy of the denoiser: single cases, and simulations of random arrivals."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import pytest

from imprompt_serving.denoiser.policy import (
    CALL_OVERHEAD,
    CANARY_PRIORITY,
    DEFAULT_PRIORITY,
    FIRST_PRIORITY,
    FIRST_TURN,
    LAST_PRIORITY,
    START_PATIENCE,
    SWITCH_COST,
    TURN_COST,
    Candidate,
    RowGrant,
    Turn,
    not_yet_startable,
    patience,
    plan,
    rows_to_call,
)
from imprompt_serving.specs import CallRows


def started(key: str = "a", pending: int = 2, last_served_tick: int = 0, priority: int = DEFAULT_PRIORITY) -> Candidate:
    return Candidate(key, pending, pending, last_served_tick, True, priority)


def new(key: str = "a", pending: int = 2, last_served_tick: int = 0, priority: int = DEFAULT_PRIORITY) -> Candidate:
    return Candidate(key, pending, pending, last_served_tick, False, priority)


def served(candidates: list[Candidate], limit: int = 8) -> dict[int, int]:
    return dict(plan(candidates, CallRows(limit)))


def test_nothing_to_do() -> None:
    assert plan([], CallRows(8)) == []


def test_jobs_with_the_same_key_share_a_call() -> None:
    assert served([started(), started(), new()]) == {0: 2, 1: 2, 2: 2}


def test_all_rows_of_a_call_have_the_key_of_the_leader() -> None:
    assert served(
        [started("a", last_served_tick=3), started("b", last_served_tick=2), started("b", last_served_tick=3)]
    ) == {
        1: 2,
        2: 2,
    }


def test_jobs_served_longest_ago_come_first_and_the_last_one_gets_the_remaining_rows() -> None:
    assert plan(
        [
            started(last_served_tick=2),
            started(pending=3, last_served_tick=1),
            started(last_served_tick=1),
            started(last_served_tick=3),
        ],
        CallRows(8),
    ) == [
        RowGrant(2, 2),
        RowGrant(1, 3),
        RowGrant(0, 2),
        RowGrant(3, 1),
    ]


def test_a_running_job_goes_before_a_new_one_with_another_key_for_a_while() -> None:
    assert served([new("b", last_served_tick=0), started(last_served_tick=START_PATIENCE - 1)]) == {1: 2}
    assert served([new("b", last_served_tick=0), started(last_served_tick=START_PATIENCE + 1)]) == {0: 2}


def test_a_job_does_not_start_while_others_with_its_key_fill_a_call() -> None:
    line = [new(last_served_tick=0), started(last_served_tick=900), started(last_served_tick=901)]
    assert not_yet_startable(line, CallRows(4)) == {0}
    assert served(line, limit=4) == {1: 2, 2: 2}
    assert not_yet_startable(line, CallRows(5)) == set()
    assert served(line, limit=5) == {0: 2, 1: 2, 2: 1}


def test_waiting_jobs_start_in_order() -> None:
    assert not_yet_startable(
        [new(last_served_tick=3), started(), new(last_served_tick=1), new(last_served_tick=2)], CallRows(4)
    ) == {0, 3}


def test_jobs_only_wait_for_those_of_their_priority() -> None:
    line = [started(), started(), new(priority=FIRST_PRIORITY), new(), new(priority=LAST_PRIORITY)]
    assert not_yet_startable(line, CallRows(4)) == {3, 4}


def test_small_jobs_do_not_wait_for_large_ones() -> None:
    assert not_yet_startable([started(pending=64), started(pending=64), new(), new(pending=64)], CallRows(8)) == {3}


def test_waiting_jobs_get_the_remaining_rows_of_a_call() -> None:
    line = [Candidate("a", 64, 3, 0, True), new(pending=64)]
    assert not_yet_startable(line, CallRows(8)) == {1}
    assert served(line) == {0: 3, 1: 5}


def test_a_large_job_leaves_half_of_a_call_to_small_ones() -> None:
    assert served(
        [
            started(pending=64, last_served_tick=0),
            new(last_served_tick=5),
            new(last_served_tick=6),
            new(last_served_tick=7),
        ]
    ) == {0: 4, 1: 2, 2: 2}


def test_a_job_of_half_a_call_is_small() -> None:
    line = [started(pending=64, last_served_tick=0), started(pending=4, last_served_tick=5)]
    assert served(line) == {0: 4, 1: 4}
    assert served([line[0], started(pending=5, last_served_tick=5)]) == {0: 8}


def test_a_large_job_gets_the_rows_that_small_ones_leave() -> None:
    assert served([started(pending=64, last_served_tick=0), new(last_served_tick=5)]) == {0: 6, 1: 2}


def test_large_jobs_run_one_after_the_other() -> None:
    assert served([started(pending=8, last_served_tick=0), started(pending=8, last_served_tick=1)]) == {0: 8}


def test_canary_goes_first_and_delays_no_start() -> None:
    line = [started(priority=FIRST_PRIORITY), new(), new("small", pending=1, priority=CANARY_PRIORITY)]
    assert plan(line, CallRows(4)) == [RowGrant(2, 1)]
    assert not_yet_startable(line, CallRows(4)) == not_yet_startable(line[:2], CallRows(4))


def test_priority_decides_who_goes_first() -> None:
    line = [started(priority=FIRST_PRIORITY, last_served_tick=9), started(), started(priority=LAST_PRIORITY)]
    assert served(line[1:], limit=2) == {0: 2}
    assert served([line[0], line[2]], limit=2) == {0: 2}


@dataclass
class SimulatedJob:
    """A job of the simulation: the pending rows of its current step, and its history."""

    batch_key: str
    rows: int
    steps: int
    priority: int
    last_served_tick: int
    pending: int = 0
    frames: int = 1
    started: bool = False
    bound: int = 0
    loras: str = ""

    def candidate(self) -> Candidate:
        return Candidate(
            self.batch_key,
            self.rows,
            self.pending,
            self.last_served_tick,
            self.started,
            self.priority,
            self.frames,
            self.loras,
        )


@pytest.mark.parametrize("seed", range(20))
def test_simulation_of_random_arrivals(seed: int) -> None:
    """No job waits longer than the policy promises, calls keep the row limit, and no call is emptier than necessary.

    No more jobs are started at a time than calls can hold, however long the queue.
    """
    random_ = random.Random(seed)
    limit = random_.choice([1, 2, 8, 12, 16])
    call_rows = CallRows(limit, bucketed=seed % 2 == 1)
    keys = [f"size-{index}" for index in range(random_.choice([1, 2, 5]))]
    sets = ["", "a=1.0", "a=0.5 b=1.0"][: random_.choice([1, 3])]
    rate = random_.choice([0.05, 0.3, 1.0])
    turn, turn_ticks = FIRST_TURN, 1 if len(sets) == 1 else LONGEST_TURN
    jobs: list[SimulatedJob] = []
    finished: list[SimulatedJob] = []
    arrivals, tick = 200, 0
    while arrivals or jobs:
        while arrivals and len(jobs) < 60 and random_.random() < rate:
            rows = random_.choice([1, 2, 2, 2, 2, limit, limit, 8 * limit])
            priority = random_.choice([DEFAULT_PRIORITY] * 6 + [FIRST_PRIORITY, LAST_PRIORITY])
            key, steps = random_.choice(keys), random_.choice([1, 2, 3, 5, 8, 30])
            frames = 4 if key == "size-1" else 1
            loras = random_.choice(sets)
            job = SimulatedJob(f"{key} {loras}", rows, steps, priority, tick, pending=rows, frames=frames, loras=loras)
            jobs.append(job)
            arrivals -= 1
        candidates = [job.candidate() for job in jobs]
        grants = plan(candidates, call_rows, turn)
        _check_call(candidates, grants, call_rows)
        turn = _after(turn, candidates, grants, call_rows)
        _serve(jobs, grants, tick, call_rows, turn_ticks)
        _check_started(jobs, limit)
        finished += [job for job in jobs if not job.steps]
        jobs = [job for job in jobs if job.steps]
        tick += 1
    assert len(finished) == 200
    assert all(not job.steps for job in finished)


LONGEST_TURN = -(-TURN_COST // (1 + CALL_OVERHEAD))
"""Ticks of a turn whose calls have one row."""


def _after(turn: Turn, candidates: list[Candidate], grants: list[RowGrant], call_rows: CallRows) -> Turn:
    """Return the turn after a call; check that it only switches if the turn is over, or no job needs its LoRAs."""
    if not grants:
        return turn
    leader = candidates[grants[0].index]
    if leader.loras != turn.loras:
        assert turn.cost >= TURN_COST or all(candidate.loras != turn.loras for candidate in candidates)
    return turn.after(leader, sum(given for _, given in grants), call_rows)


def _check_call(candidates: list[Candidate], grants: list[RowGrant], call_rows: CallRows) -> None:
    rows = dict(grants)
    assert len(rows) == len(grants), "each job once"
    assert bool(grants) == bool(candidates)
    assert all(0 < given <= candidates[index].pending for index, given in grants)
    assert len({candidates[index].batch_key for index in rows}) <= 1
    open_rows = Counter[str]()
    for candidate in candidates:
        open_rows[str(candidate.batch_key)] += candidate.pending
    if grants:
        # A call has all pending rows with its key, or as many as it holds. With buckets, at least three quarters of the
        # computed rows are not padding.
        leader = candidates[grants[0].index]
        sizes, pending = call_rows.of_frames(leader.frames), open_rows[str(leader.batch_key)]
        if call_rows.bucketed:
            assert sum(rows.values()) <= sizes.most
            assert sum(rows.values()) >= 0.75 * sizes.padded(sum(rows.values()))
        else:
            assert sum(rows.values()) == min(sizes.most, pending)


def _check_started(jobs: list[SimulatedJob], limit: int) -> None:
    """Check that the started small jobs of each key and priority fill one call, except for the last job of it."""
    started = Counter[tuple[str, int]]()
    for job in jobs:
        room = max(limit // job.frames, 1)
        if job.started and job.rows <= room // 2:
            started[job.batch_key, job.priority] += job.rows
            assert started[job.batch_key, job.priority] < room + room // 2


def _serve(
    jobs: list[SimulatedJob], grants: list[RowGrant], tick: int, call_rows: CallRows, turn_ticks: int = 1
) -> None:
    rows = dict(grants)
    waiting = not_yet_startable([job.candidate() for job in jobs], call_rows)
    for index, job in enumerate(jobs):
        # Jobs that arrive after the tick at which this one is due are due later, so only the present ones count.
        due = job.last_served_tick + patience(job.candidate())
        if tick <= due + 1 or index in waiting:
            job.bound = max(due, tick) + 1 + turn_ticks * len(jobs)
        if index not in rows:
            continue
        assert tick <= job.bound, (
            f"waited {tick - job.last_served_tick} ticks, {job.bound - job.last_served_tick} are promised"
        )
        job.pending -= rows[index]
        job.last_served_tick, job.started = tick, True
        if not job.pending:
            job.steps, job.pending = job.steps - 1, job.rows


@pytest.mark.parametrize("crowd", [1, 8])
def test_small_jobs_continue_next_to_a_large_one(crowd: int) -> None:
    """Every small job takes a step in most ticks, and the large one makes progress too."""
    jobs = [SimulatedJob("a", 64, 40, DEFAULT_PRIORITY, 0, pending=64)]
    jobs += [SimulatedJob("a", 2, 40, DEFAULT_PRIORITY, 0, pending=2) for _ in range(crowd)]
    tick = 0
    while any(job.steps for job in jobs[1:]):
        alive = [job for job in jobs if job.steps]
        _serve(alive, plan([job.candidate() for job in alive], CallRows(8)), tick, CallRows(8))
        tick += 1
    assert tick <= 40 * (1 + crowd // 2) + START_PATIENCE, "small jobs wait for the large one"
    assert jobs[0].steps < 40 or jobs[0].pending < 64, "the large job is not served at all"


def test_jobs_of_equal_size_finish_one_after_the_other() -> None:
    """Eight jobs fill a call, then eight more arrive: the first ones do not wait for the others."""
    jobs = [SimulatedJob("a", 1, 50, DEFAULT_PRIORITY, 0, pending=1) for _ in range(16)]
    ends: list[int] = []
    for tick in range(100):
        alive = [job for job in jobs if job.steps]
        _serve(alive, plan([job.candidate() for job in alive], CallRows(8)), tick, CallRows(8))
        ends += [tick for job in alive if not job.steps]
    assert ends == [49] * 8 + [99] * 8


@pytest.mark.parametrize(
    ("pending", "rows"),
    [(1, 1), (2, 2), (3, 3), (5, 4), (6, 4), (7, 7), (8, 8), (9, 8), (12, 8), (14, 14), (15, 15), (16, 16), (40, 16)],
)
def test_rows_that_would_spill_into_the_next_bucket_wait_unless_padding_is_cheaper(pending: int, rows: int) -> None:
    assert rows_to_call(pending, CallRows(16, True)) == rows
    assert rows_to_call(pending, CallRows(16)) == min(pending, 16)


def test_the_job_served_last_is_left_to_the_next_call() -> None:
    line = [started(pending=1, last_served_tick=index) for index in range(9)]
    assert dict(plan(line, CallRows(16, True))) == dict.fromkeys(range(8), 1)


def test_rows_left_over_come_first_in_the_next_call() -> None:
    jobs = [SimulatedJob("a", 1, 40, DEFAULT_PRIORITY, 0, pending=1, started=True) for _ in range(9)]
    for tick in range(1, 11):
        _serve(jobs, plan([job.candidate() for job in jobs], CallRows(16, True)), tick, CallRows(16, True))
        assert all(job.last_served_tick >= tick - 1 for job in jobs), "a job waited for two calls"
    assert 9 * 40 - sum(job.steps for job in jobs) == 10 * 8


def spent(seed: int, rate: float, call_rows: CallRows, count: int = 80) -> tuple[float, float]:
    """Simulate an engine that pads to buckets: return when the last job ends, and the mean time of a job.

    The unit is the time of a row.
    """
    random_, engine = random.Random(seed), CallRows(16, bucketed=True)
    arrivals, at = [], 0.0
    for _ in range(count):
        arrivals.append((at, random_.choice([1, 2, 2, 2, 4, 6]), random_.choice([8, 20, 30])))
        at += random_.expovariate(rate)
    active: list[tuple[float, SimulatedJob]] = []
    now, tick, total = 0.0, 0, 0.0
    while arrivals or active:
        if not active:
            now = max(now, arrivals[0][0])
        while arrivals and arrivals[0][0] <= now:
            at, rows, steps = arrivals.pop(0)
            active.append((at, SimulatedJob("a", rows, steps, DEFAULT_PRIORITY, tick, pending=rows)))
        jobs = [job for _, job in active]
        grants = plan([job.candidate() for job in jobs], call_rows)
        _serve(jobs, grants, tick, call_rows)
        now, tick = now + engine.padded(sum(given for _, given in grants)) + CALL_OVERHEAD, tick + 1
        total += sum(now - at for at, job in active if not job.steps)
        active = [(at, job) for at, job in active if job.steps]
    return now, total / count


@pytest.mark.parametrize("rate", [1 / 200, 1 / 80, 1 / 10])
def test_a_policy_that_knows_of_padding_serves_more(rate: float) -> None:
    """Compared with always filling calls, under light load, near capacity, and under overload."""
    aware, unaware = ([spent(seed, rate, CallRows(16, bucketed)) for seed in range(4)] for bucketed in (True, False))
    (end, mean), (end_unaware, mean_unaware) = (map(sum, zip(*made, strict=True)) for made in (aware, unaware))
    assert end <= end_unaware
    assert mean < mean_unaware


def test_a_row_of_a_clip_counts_as_many_rows_as_it_has_frames() -> None:
    assert plan([Candidate("clip", 5, 5, 0, True, frames=4)], CallRows(8)) == [RowGrant(0, 2)]
    assert plan([Candidate("clip", 2, 2, 0, True, frames=16)], CallRows(8)) == [RowGrant(0, 1)]


def spent_on_loras(turns: bool, sets: int, crowd: int) -> tuple[int, int, int]:
    """Return the cost of jobs with several sets of LoRAs, in rows; the switches; the longest wait of a started job.

    Each set has `crowd` jobs of two rows, which all arrive at once.
    """
    call_rows = CallRows(8)
    jobs = [
        SimulatedJob(f"64 {loras}", 2, 30, DEFAULT_PRIORITY, 0, pending=2, loras=str(loras))
        for _ in range(crowd)
        for loras in range(sets)
    ]
    turn, cost, switches, wait, tick = FIRST_TURN, 0, 0, 0, 0
    while alive := [job for job in jobs if job.steps]:
        candidates = [job.candidate() for job in alive]
        grants = plan(candidates, call_rows, turn if turns else FIRST_TURN)
        new = turn.after(candidates[grants[0].index], sum(given for _, given in grants), call_rows)
        switches += new.loras != turn.loras
        cost += sum(given for _, given in grants) + CALL_OVERHEAD + SWITCH_COST * (new.loras != turn.loras)
        served_before = {id(job): job.last_served_tick for job in alive if job.started}
        _serve(alive, grants, tick, call_rows, LONGEST_TURN)
        wait = max([wait, *(tick - served_before.get(id(alive[index]), tick) for index, _ in grants)])
        turn, tick = new, tick + 1
    return cost, switches, wait


@pytest.mark.parametrize(("sets", "crowd"), [(2, 1), (2, 4), (3, 4), (8, 2)])
def test_turns_of_loras_are_long_enough_to_pay_for_switches(sets: int, crowd: int) -> None:
    cost, switches, wait = spent_on_loras(True, sets, crowd)
    hasty_cost, hasty_switches, _ = spent_on_loras(False, sets, crowd)
    assert cost < hasty_cost
    assert switches < 0.6 * hasty_switches
    assert SWITCH_COST * switches <= cost / 9 + SWITCH_COST * sets
    assert switches > sets, "the sets run one after the other"
    turn_ticks = -(-TURN_COST // (2 * crowd + CALL_OVERHEAD))
    assert wait <= sets * turn_ticks, "a set waits for more than the turns of the others"


def test_a_turn_goes_on_while_others_wait_and_ends_when_it_has_cost_enough() -> None:
    line = [started("a", last_served_tick=9)._replace(loras="a"), started("b", last_served_tick=2)._replace(loras="b")]
    assert dict(plan(line, CallRows(8), Turn("a", TURN_COST - 1))) == {0: 2}
    assert dict(plan(line, CallRows(8), Turn("a", TURN_COST))) == {1: 2}
    assert dict(plan(line[1:], CallRows(8), Turn("a", 0))) == {0: 2}, "nobody needs the LoRAs of the turn"


def test_jobs_of_other_sizes_with_the_same_loras_share_a_turn() -> None:
    line = [started(key, last_served_tick=tick)._replace(loras="a") for tick, key in enumerate(("64 a", "96 a"))]
    line.append(started("64 b", last_served_tick=-5)._replace(loras="b"))
    assert dict(plan(line, CallRows(8), Turn("a", 0))) == {0: 2}


def test_cost_of_a_turn() -> None:
    clip = Candidate("clip", 2, 2, 0, True, frames=4, loras="a")
    turn = Turn("b", 5).after(clip, 2, CallRows(16))
    assert turn == Turn("a", 8 + CALL_OVERHEAD)
    assert turn.after(clip._replace(frames=1), 3, CallRows(16, True)) == Turn("a", turn.cost + 4 + CALL_OVERHEAD)
