"""A simulated server: the denoiser's own admission and policy, with an engine that only takes time."""

from __future__ import annotations

from dataclasses import dataclass, field

from imprompt_bench.fleet.engine import Engine
from imprompt_bench.fleet.traffic import GUIDANCE_BRANCHES, Kind
from imprompt_serving.denoiser.admission import Load, check_room
from imprompt_serving.denoiser.policy import FIRST_TURN, Candidate, Turn, plan
from imprompt_serving.specs import CallRows, Limits

_LATEST_WEIGHT = 0.2
"""Weight of the latest call in the average of call seconds, as in the denoiser's loop."""


@dataclass(slots=True, eq=False)
class Job:
    """A request as a member sees it. `pending` are the rows of the current step that no call has computed."""

    kind: Kind
    steps: int
    number: int
    pending: int = 0
    last_served_tick: int = 0
    started: bool = False

    @property
    def rows(self) -> int:
        return GUIDANCE_BRANCHES * self.kind.pictures

    @property
    def batch_key(self) -> str:
        return f"{self.kind.scale} {self.kind.frames}"

    @property
    def load(self) -> Load:
        return Load(self.kind.rows, self.steps, self.batch_key)

    def candidate(self) -> Candidate:
        return Candidate(
            self.batch_key, self.rows, self.pending, self.last_served_tick, self.started, frames=self.kind.frames
        )


@dataclass(slots=True)
class Member:
    """A server with one denoiser. The caller tells it when a call has ended."""

    engine: Engine
    call_rows: CallRows
    limits: Limits
    jobs: list[Job] = field(default_factory=list)
    _served: list[tuple[Job, int]] = field(default_factory=list)
    _tick: int = 0
    _tick_seconds: float = 0.0
    _turn: Turn = FIRST_TURN

    @property
    def calling(self) -> bool:
        return bool(self._served)

    def admit(self, job: Job) -> None:
        """Take a job.

        Raises:
            Overloaded: the queue is full.
        """
        running = [other.load for other in self.jobs if other.started]
        waiting = [other.load for other in self.jobs if not other.started]
        check_room(
            job.load,
            running,
            waiting,
            call_rows=self.call_rows,
            tick_seconds=self._tick_seconds,
            limits=self.limits,
        )
        job.pending, job.last_served_tick = job.rows, self._tick
        self.jobs.append(job)

    def start_call(self) -> float | None:
        """Start the next call, and return how long it takes; None if there is nothing to compute."""
        candidates = [job.candidate() for job in self.jobs]
        grants = plan(candidates, self.call_rows, self._turn)
        if not grants:
            return None
        self._tick += 1
        leader, rows = candidates[grants[0].index], sum(grant.rows for grant in grants)
        self._turn = self._turn.after(leader, rows, self.call_rows)
        self._served = [(self.jobs[grant.index], grant.rows) for grant in grants]
        for job, _ in self._served:
            job.started, job.last_served_tick = True, self._tick
        kind = self._served[0][0].kind
        padded = self.call_rows.of_frames(kind.frames).padded(rows)
        seconds = self.engine.call + self.engine.row * kind.scale**2 * kind.frames * padded
        self._tick_seconds += (seconds - self._tick_seconds) * (_LATEST_WEIGHT if self._tick_seconds else 1.0)
        return seconds

    def end_call(self) -> tuple[list[Job], float]:
        """Return the jobs that finish with this call, and for how long the member decodes their pictures."""
        finished, seconds = [], 0.0
        for job, rows in self._served:
            job.pending -= rows
            if not job.pending:
                job.steps, job.pending = job.steps - 1, job.rows
                if not job.steps:
                    finished.append(job)
                    seconds += self.engine.picture * job.kind.pictures * job.kind.frames * job.kind.scale**2
        self._served = []
        self.jobs = [job for job in self.jobs if job.steps]
        return finished, seconds

    def fail(self) -> list[Job]:
        """Lose all jobs, and start again with an empty queue; return the jobs."""
        lost, self.jobs, self._served = self.jobs, [], []
        self._tick, self._tick_seconds, self._turn = 0, 0.0, FIRST_TURN
        return lost
