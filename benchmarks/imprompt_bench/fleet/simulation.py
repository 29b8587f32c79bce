"""Simulate a fleet: independent Envoys in front of many members, some of which fail and return.

As in the configuration of `deploy/envoy`, a request that a member refuses or loses is sent to another one, up to three
times. Callers do not retry.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import numpy as np

from imprompt_bench.fleet.engine import Engine
from imprompt_bench.fleet.member import Job, Member
from imprompt_bench.fleet.policies import Policy, View
from imprompt_bench.fleet.traffic import ARRIVALS, MIX, Kind, draw
from imprompt_serving.errors import Overloaded
from imprompt_serving.specs import CallRows, Limits

RETRIES = 3
BACK_OFF_S = 0.1
"""Retries and the base of their delay, as in the configuration of Envoy: from 0 to (2**retry - 1) times the base."""
REPICKS = 100
"""How often Envoy chooses again while it gets a member that has already refused the request."""
NOTICE_S = 2.0
"""Until an Envoy takes a dead member out: the interval of its health checks."""
WARM_UP = 0.2
"""The first part of the arrivals, which is not counted: the fleet starts empty."""


class Setup(NamedTuple):
    """What is simulated."""

    engine: Engine
    members: int
    policy: Policy
    rate: float
    """Requests per second, for the whole fleet."""
    seconds: float
    """How long requests arrive."""
    envoys: int = 2
    arrivals: str = "poisson"
    mix: tuple[Kind, ...] = MIX
    steps: int = 20
    call_rows: CallRows = CallRows(16)
    limits: Limits = Limits()
    lifetime: float | None = None
    """Average seconds until a member fails; None if members never fail."""
    downtime: float = 60.0
    """Seconds until a failed member is back."""
    seed: int = 0


@dataclass(slots=True)
class Request:
    """A request, and the members that its Envoy has sent it to."""

    kind: Kind
    arrived: float
    envoy: int
    tried: list[int] = field(default_factory=list)
    ended: float | None = None
    refused: bool = False


class Outcome(NamedTuple):
    """What happened to the requests that arrived after the warm-up."""

    latencies: np.ndarray
    refused: float
    """Share of the requests."""
    idle: float
    """Share of the time in which a member that was up had nothing to do."""
    resent: int
    """How often a request was sent to another member, warm-up included."""
    requests: int
    """Requests that arrived, warm-up included."""
    open: int
    """Requests that never ended."""

    def percentile(self, q: float) -> float:
        return float(np.percentile(self.latencies, q)) if len(self.latencies) else float("inf")


def simulate(setup: Setup) -> Outcome:
    """Simulate until every request has ended."""
    return _Fleet(setup).run()


def capacity(engine: Engine, mix: tuple[Kind, ...], steps: int, call_rows: CallRows) -> float:
    """Return the most requests per second that a member can serve: those of a kind fill calls without padding."""
    seconds = 0.0
    for kind in mix:
        row = engine.row * kind.scale**2 + engine.call / call_rows.most
        pictures = engine.picture * kind.pictures * kind.frames * kind.scale**2
        seconds += kind.share * (kind.rows * steps * row + pictures)
    return sum(kind.share for kind in mix) / seconds


def seconds_alone(engine: Engine, kind: Kind, steps: int, call_rows: CallRows) -> float:
    """Return how long a request takes on a member that has no other."""
    pixels, together = kind.scale**2, min(call_rows.of_frames(kind.frames).most * kind.frames, kind.rows)
    calls = steps * -(-kind.rows // together)
    decoding = engine.picture * kind.pictures * kind.frames * pixels
    return calls * engine.call + steps * kind.rows * engine.row * pixels + decoding + engine.request


class _Fleet:
    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._members = [Member(setup.engine, setup.call_rows, setup.limits) for _ in range(setup.members)]
        self._up = [True] * setup.members
        self._occupied = [False] * setup.members
        """Whether each member calls its engine, or decodes pictures."""
        self._failures = [0] * setup.members
        """How often each member has failed: what it had begun before does not end."""
        self._views = [View(setup.members, 1000 * setup.seed + index) for index in range(setup.envoys)]
        self._chance, self._kinds = random.Random(setup.seed), draw(setup.seed, setup.mix)
        self._requests: list[Request] = []
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = count()
        self._now = self._busy = self._away = 0.0
        self._resent = 0

    def run(self) -> Outcome:
        arrivals = ARRIVALS[self._setup.arrivals](self._setup.rate, self._setup.seed)
        self._at(next(arrivals), self._arrive, arrivals)
        if self._setup.lifetime is not None:
            for index in range(self._setup.members):
                self._at(self._chance.expovariate(1 / self._setup.lifetime), self._fail, index)
        while self._events:
            self._now, _, event, arguments = heapq.heappop(self._events)
            event(*arguments)
        return self._outcome()

    def _at(self, time: float, event: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._events, (time, next(self._order), event, arguments))

    def _arrive(self, arrivals: Iterator[float]) -> None:
        if self._now >= self._setup.seconds:
            return
        self._requests.append(Request(next(self._kinds), self._now, self._chance.randrange(len(self._views))))
        self._send(len(self._requests) - 1)
        self._at(next(arrivals), self._arrive, arrivals)

    def _send(self, number: int) -> None:
        """Send a request to the member that its Envoy chooses."""
        request = self._requests[number]
        view = self._views[request.envoy]
        if not view.up.any():
            self._end(request, refused=True)
            return
        for _ in range(REPICKS + 1):
            index = self._setup.policy(view)
            if index not in request.tried:
                break
        request.tried.append(index)
        view.requests[index] += 1
        view.rows[index] += request.kind.rows
        try:
            if not self._up[index]:
                raise Overloaded("the member is down")
            self._members[index].admit(Job(request.kind, self._setup.steps, number))
        except Overloaded:
            self._leave(request)
            self._retry(number)
        else:
            self._work(index)

    def _retry(self, number: int) -> None:
        """Send a request again after a pause, if it has retries left."""
        request = self._requests[number]
        retry = len(request.tried)
        if retry > RETRIES:
            self._end(request, refused=True)
        else:
            self._resent += 1
            self._at(self._now + self._chance.uniform(0, (2**retry - 1) * BACK_OFF_S), self._send, number)

    def _leave(self, request: Request) -> None:
        """Take a request off the books of its Envoy."""
        view, index = self._views[request.envoy], request.tried[-1]
        view.requests[index] -= 1
        view.rows[index] -= request.kind.rows

    def _end(self, request: Request, *, refused: bool = False) -> None:
        request.ended, request.refused = self._now, refused

    def _work(self, index: int) -> None:
        """Start the next call of a member, unless it is occupied."""
        if self._occupied[index]:
            return
        seconds = self._members[index].start_call()
        if seconds is not None:
            self._occupied[index] = True
            self._count(self._now, self._now + seconds)
            self._at(self._now + seconds, self._called, index, self._failures[index])

    def _called(self, index: int, failures: int) -> None:
        if failures == self._failures[index]:
            jobs, seconds = self._members[index].end_call()
            self._count(self._now, self._now + seconds)
            self._at(self._now + seconds, self._decoded, index, failures, jobs)

    def _decoded(self, index: int, failures: int, jobs: list[Job]) -> None:
        if failures != self._failures[index]:
            for job in jobs:
                self._lose(job)
            return
        for job in jobs:
            request = self._requests[job.number]
            self._leave(request)
            self._end(request)
        self._occupied[index] = False
        self._work(index)

    def _count(self, start: float, end: float) -> None:
        """Add the part of a busy time that lies between the warm-up and the last arrival."""
        first, last = WARM_UP * self._setup.seconds, self._setup.seconds
        self._busy += max(min(end, last) - max(start, first), 0.0)

    def _fail(self, index: int) -> None:
        """Let a member die. Envoys notice later, and retry what it had."""
        if self._now >= self._setup.seconds:
            return  # the rest must end
        self._up[index], self._occupied[index] = False, False
        self._failures[index] += 1
        for job in self._members[index].fail():
            self._lose(job)
        back = self._now + self._setup.downtime
        self._away += max(min(back, self._setup.seconds) - max(self._now, WARM_UP * self._setup.seconds), 0.0)
        self._at(self._now + NOTICE_S, self._notice, index, False)
        self._at(back, self._return, index)

    def _lose(self, job: Job) -> None:
        self._leave(self._requests[job.number])
        self._retry(job.number)

    def _notice(self, index: int, up: bool) -> None:
        for view in self._views:
            view.up[index] = up

    def _return(self, index: int) -> None:
        assert self._setup.lifetime is not None
        self._up[index] = True
        self._notice(index, True)
        self._at(self._now + self._chance.expovariate(1 / self._setup.lifetime), self._fail, index)

    def _outcome(self) -> Outcome:
        setup = self._setup
        counted = [request for request in self._requests if request.arrived >= WARM_UP * setup.seconds]
        served = [request for request in counted if not request.refused]
        latencies = [(request.ended or 0.0) - request.arrived + setup.engine.request for request in served]
        seconds = (1 - WARM_UP) * setup.seconds
        return Outcome(
            latencies=np.array(latencies),
            refused=1 - len(served) / max(len(counted), 1),
            idle=1 - self._busy / (setup.members * seconds - self._away),
            resent=self._resent,
            requests=len(self._requests),
            open=sum(request.ended is None for request in self._requests),
        )
