"""Simulated fleets: against queueing theory, and that no request is lost; sizing, and what an engine is fitted to."""

from __future__ import annotations

from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest

from imprompt_bench import cli
from imprompt_bench.fleet import sizing
from imprompt_bench.fleet.engine import SD15_H200, Engine, measured
from imprompt_bench.fleet.policies import POLICIES, View
from imprompt_bench.fleet.simulation import Setup, capacity, seconds_alone, simulate
from imprompt_bench.fleet.sizing import ROUTING, answers
from imprompt_bench.fleet.study import DETAILS, SECONDS, cells
from imprompt_bench.fleet.traffic import MIX, Kind, bursty, poisson
from imprompt_bench.results import BenchError, Measurement, Run, Sample
from imprompt_serving.specs import CallRows, Limits

FULL = (Kind("full", 1.0, pictures=8),)
"""Requests that fill a call of 16 rows, so that a member serves one after the other."""
ONE_SECOND = Engine(call=0.2, row=0.05)
"""A call with 16 rows takes a second."""
NO_LIMITS = Limits(waiting_rows=10**6, waiting_seconds=1e9)


def single(load: float, *, policy: str = "round robin") -> Setup:
    return Setup(ONE_SECOND, 1, POLICIES[policy], load, 20_000, envoys=1, mix=FULL, steps=1, limits=NO_LIMITS)


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_one_member_is_a_queue_with_constant_service(load: float) -> None:
    """The mean latency is that of an M/D/1 queue (Pollaczek-Khinchine), and the member idles for the rest."""
    outcome = simulate(single(load))
    assert outcome.latencies.mean() == pytest.approx(1 + load / (2 * (1 - load)), rel=0.05)
    assert outcome.latencies.min() == pytest.approx(1)
    assert outcome.idle == pytest.approx(1 - load, abs=0.02)


def test_requests_of_several_steps_share_calls() -> None:
    """Four pictures of four rows run together: with a cost per call, that is faster than one after the other."""
    kind = (Kind("four rows", 1.0, pictures=2),)
    rate = 0.9 * capacity(ONE_SECOND, kind, 10, CallRows(16))
    outcome = simulate(single(1)._replace(mix=kind, steps=10, rate=rate, seconds=2000))
    alone = 10 * (ONE_SECOND.call + 4 * ONE_SECOND.row)
    assert rate > 1 / alone
    assert outcome.latencies.min() == pytest.approx(alone)
    assert 0 < outcome.idle < 0.11, "calls that are not full take more time per row"
    assert outcome.percentile(99) < 20 * alone, "the queue grows"


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_ends_once_while_members_fail(policy: str) -> None:
    views: set[View] = set()

    def choose(view: View) -> int:
        views.add(view)
        return POLICIES[policy](view)

    rate = 0.8 * 8 * capacity(SD15_H200, MIX, 20, CallRows(16))
    outcome = simulate(Setup(SD15_H200, 8, choose, rate, 20, envoys=3, lifetime=20, downtime=3))
    assert outcome.open == 0
    assert outcome.resent > 0
    assert outcome.requests == pytest.approx(20 * rate, rel=0.2)
    assert len(views) == 3
    for view in views:
        assert not view.requests.any()
        assert not view.rows.any()


def test_full_members_refuse_and_others_are_tried() -> None:
    rate = 3 * 4 * capacity(SD15_H200, MIX, 20, CallRows(16))
    limited = Setup(SD15_H200, 4, POLICIES[ROUTING], rate, 10, limits=Limits(waiting_rows=16))
    outcome = simulate(limited)
    assert outcome.refused == pytest.approx(2 / 3, abs=0.15)
    assert outcome.idle < 0.02
    assert outcome.resent > outcome.requests
    assert simulate(limited._replace(rate=rate / 6)).refused == 0


def test_knowing_all_requests_beats_taking_turns() -> None:
    rate = 0.8 * 10 * capacity(SD15_H200, MIX, 20, CallRows(16))
    setup = Setup(SD15_H200, 10, POLICIES["round robin"], rate, 30, envoys=1)
    turns, least, rows = (
        simulate(setup._replace(policy=POLICIES[name])).percentile(99)
        for name in ("round robin", "least requests of all", "least outstanding rows")
    )
    assert least < 0.7 * turns
    assert rows < 1.1 * least
    alone = simulate(setup._replace(policy=POLICIES["least requests of all"], envoys=10)).percentile(99)
    assert alone > 1.2 * least, "ten Envoys know as much as one"


def test_simulations_repeat() -> None:
    setup = Setup(SD15_H200, 5, POLICIES["least requests, 2 draws"], 10, 10, lifetime=30)
    first, same, other = simulate(setup), simulate(setup), simulate(setup._replace(seed=1))
    assert np.array_equal(first.latencies, same.latencies)
    assert not np.array_equal(first.latencies, other.latencies)


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_choose_members_that_are_up(policy: str) -> None:
    view = View(6, seed=0)
    view.up[[0, 2, 5]] = False
    assert {POLICIES[policy](view) for _ in range(60)} == {1, 3, 4}


def test_policies_choose_the_least_busy_member() -> None:
    view = View(4, seed=0)
    view.requests[:], view.rows[:] = [3, 1, 2, 4], [6, 32, 4, 8]
    assert POLICIES["least requests of all"](view) == 1
    assert POLICIES["least outstanding rows"](view) == 2
    eight, two = ([POLICIES[f"least requests, {draws} draws"](view) for _ in range(400)].count(1) for draws in (8, 2))
    assert eight == pytest.approx(400 * (1 - 0.75**8), abs=40)
    assert two == pytest.approx(400 * (1 - 0.75**2), abs=60)


def test_bursts_keep_the_average_rate() -> None:
    for arrivals, least, most in ((poisson, 0.8, 1.2), (bursty, 3.0, 20.0)):
        times = list(islice(arrivals(20.0, 0), 20_000))
        assert all(earlier < later for earlier, later in pairwise(times))
        assert len(times) / times[-1] == pytest.approx(20, rel=0.1)
        counts = np.histogram(times, np.arange(0, times[-1]))[0]
        assert least < counts.var() / counts.mean() < most, arrivals.__name__


def grown(label: str, value: int, denoise: float, vae: float) -> Measurement:
    timings = {"denoise": denoise, "vae_decoder": vae, "total": denoise + vae + 0.5}
    sample = Sample(index=0, intended=0, sent=0, ended=1, timings=timings)
    return Measurement(
        scenario="growth", label=label, value=value, seconds=1, stable=True, spread=None, samples=[sample]
    )


def test_an_engine_is_fitted_to_a_result() -> None:
    """The scheduler makes one call more than steps, as PNDM does."""
    call, row, vae = 0.01, 0.02, 0.3
    points = [grown("steps", steps, (steps + 1) * (call + 2 * row), vae) for steps in (4, 8, 16)]
    points += [grown("pictures", number, 5 * (call + 2 * number * row), vae * number) for number in (1, 2, 4)]
    run = Run(command="", environment={}, bundle={}, setup={}, arithmetic={}, parity={}, measurements=points)
    assert measured(run) == pytest.approx(Engine(call=call, row=row, picture=vae, request=0.5))
    run.measurements.clear()
    with pytest.raises(BenchError, match="growth"):
        measured(run)


@pytest.mark.parametrize("kind", MIX, ids=lambda kind: kind.name)
def test_seconds_of_a_lone_request(kind: Kind) -> None:
    engine = Engine(call=0.003, row=0.002, picture=0.01, request=0.1)
    outcome = simulate(Setup(engine, 1, View.following, 0.01, 1000, envoys=1, mix=(kind,), call_rows=CallRows(8)))
    assert outcome.latencies.min() == pytest.approx(seconds_alone(engine, kind, 20, CallRows(8)))


def test_sizing_finds_the_smallest_fleet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "REQUESTS", 800)
    found = list(answers(SD15_H200, rate=40, p99=1.5, mix=MIX, steps=20, call_rows=CallRows(16)))
    members, outcome = found[-1]
    assert outcome.percentile(99) <= 1.5
    assert not outcome.refused
    fewer = dict(found)[members - 1]
    assert fewer.percentile(99) > 1.5 or fewer.refused
    assert members > 40 / 1.6 / capacity(SD15_H200, MIX, 20, CallRows(16))
    with pytest.raises(BenchError, match=r"\(full\) takes 0\.75 s on a server of its own"):
        list(answers(SD15_H200, rate=40, p99=0.1, mix=FULL, steps=20, call_rows=CallRows(16)))


def test_size_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "REQUESTS", 400)
    result = Path(__file__).parents[2] / "benchmarks/results/tiny.json"
    assert cli.main(["size", "--rate", "30", "--p99", "2", "--kind", "picture", "--result", str(result)]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].endswith("servers serve 30 pictures/s with a p99 of at most 2 s")
    assert "refused 0.0%" in printed


def test_the_study_has_every_fleet_once() -> None:
    chosen = list(cells())
    assert len(chosen) == len(set(chosen))
    fleets = {cell[:4] for cell in chosen}
    assert len(fleets) == sum(map(len, SECONDS.values())) + len(DETAILS) - 1
    assert {cell[0] for cell in chosen} == {10, 30, 100, 300, 1000}
