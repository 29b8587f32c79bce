"""Simulate fleets of 10 to 1,000 members with each way of routing: `imprompt bench fleet`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import msgspec

from imprompt_bench.fleet.engine import SD15_H200
from imprompt_bench.fleet.policies import POLICIES
from imprompt_bench.fleet.simulation import Setup, capacity, simulate
from imprompt_bench.fleet.traffic import MIX
from imprompt_bench.results import environment
from imprompt_serving.specs import CallRows

LOAD, HIGH_LOAD, OVERLOAD = 0.8, 0.9, 1.2
"""Arrival rates, relative to the capacity of all members."""
ENVOYS = 2
STEPS, CALL_ROWS = 20, CallRows(16)
LIFETIME_S = 600.0
SECONDS = {
    "poisson": {10: 90.0, 30: 40.0, 100: 15.0, 300: 8.0, 1000: 5.0},
    "bursty": {10: 90.0, 30: 60.0, 100: 30.0},
}
"""How long requests arrive, by number of members: larger fleets see as many requests in less time."""
DETAIL_MEMBERS = 100
DETAILS = ((1, LOAD), (2, LOAD), (4, LOAD), (16, LOAD), (2, HIGH_LOAD), (2, OVERLOAD))
"""Numbers of Envoys and loads to compare, for one number of members."""


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of one simulation."""

    members: int
    envoys: int
    load: float
    arrivals: str
    policy: str
    requests: int
    p50: float
    p99: float
    refused: float
    idle: float
    resent: int


class Study(msgspec.Struct, frozen=True, kw_only=True):
    """All simulations of one command."""

    command: str
    environment: dict[str, Any]
    points: list[Point]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        head = [f'"{name}": {msgspec.json.encode(getattr(self, name)).decode()}' for name in ("command", "environment")]
        points = ",\n  ".join(msgspec.json.encode(point).decode() for point in self.points)
        path.write_text("{\n" + ",\n".join([*head, f'"points": [\n  {points}\n]']) + "\n}\n")

    @classmethod
    def load(cls, path: Path) -> Study:
        return msgspec.json.decode(path.read_bytes(), type=cls)


def study(command: str, say: Callable[[str], None]) -> Study:
    """Run all simulations, on all cores."""
    before, points = environment(), []
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for point in pool.map(run, *zip(*cells(), strict=True)):
            points.append(point)
            fleet = f"{point.members} members, {point.envoys} Envoys, load {point.load}, {point.arrivals}"
            say(f"{fleet}, {point.policy}: p99 {point.p99:.2f} s")
    return Study(command=command, environment=before, points=points)


def cells() -> Iterator[tuple[int, int, float, str, str]]:
    """Yield what to simulate: members, Envoys, load, arrivals, policy."""
    fleets = [(members, ENVOYS, LOAD, arrivals) for arrivals, sizes in SECONDS.items() for members in sizes]
    fleets += [(DETAIL_MEMBERS, envoys, load, "poisson") for envoys, load in DETAILS]
    for fleet in dict.fromkeys(fleets):
        for policy in POLICIES:
            yield *fleet, policy


def run(members: int, envoys: int, load: float, arrivals: str, policy: str) -> Point:
    """Simulate one fleet."""
    rate = load * members * capacity(SD15_H200, MIX, STEPS, CALL_ROWS)
    outcome = simulate(
        Setup(
            engine=SD15_H200,
            members=members,
            policy=POLICIES[policy],
            rate=rate,
            seconds=SECONDS[arrivals][members],
            envoys=envoys,
            arrivals=arrivals,
            steps=STEPS,
            call_rows=CALL_ROWS,
            lifetime=LIFETIME_S,
        )
    )
    return Point(
        members=members,
        envoys=envoys,
        load=load,
        arrivals=arrivals,
        policy=policy,
        requests=outcome.requests,
        p50=round(outcome.percentile(50), 4),
        p99=round(outcome.percentile(99), 4),
        refused=round(outcome.refused, 5),
        idle=round(outcome.idle, 4),
        resent=outcome.resent,
    )
