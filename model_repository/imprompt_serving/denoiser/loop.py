"""The denoiser: continuous batching of the steps of all active jobs.

One thread owns the jobs and runs commands (admit, submit, cancel, stop) one after the other, each at once. A second
thread computes a tick: a call of the engines, then a step of each job's own scheduler. On a device a tick has been
computed when it has been launched; a third thread then waits for the device. At most two ticks are in flight, so that
new jobs, cancellations and deadlines are never more than two ticks late, and seconds are those of the device.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from imprompt_serving.denoiser.admission import Load, check_room
from imprompt_serving.denoiser.answers import Answers, AnswerThreads, Listener
from imprompt_serving.denoiser.batch import Batcher, RowSlice
from imprompt_serving.denoiser.meter import Meter, Population
from imprompt_serving.denoiser.policy import FIRST_TURN, Candidate, plan
from imprompt_serving.denoiser.protocol import LoopJob
from imprompt_serving.errors import Cancelled, Overloaded, RequestError, unexpected
from imprompt_serving.job import lora_set
from imprompt_serving.specs import CallRows, Limits

logger = logging.getLogger(__name__)

KEEP_S = 300.0
"""How long a place is kept for a job that was admitted, and a cancelled id is remembered for a job on its way."""
TICKS_IN_FLIGHT = 2
"""Ticks that may be launched and not complete: with one the device would idle while the next tick is launched."""
_RECENT = 0.2
"""Weight of the latest tick in the mean of tick seconds."""

Wait = Callable[[], None]
"""Returns when the device has done all that had been launched when this was made."""


@dataclass(slots=True)
class _Active:
    """A job in the loop, and how to answer it."""

    job: LoopJob
    answers: Answers


class _Advance(NamedTuple):
    """What a tick did to a job: whether it is done, the steps it has done if that is to be told, or what went wrong."""

    active: _Active
    done: bool = False
    step: int | None = None
    preview: torch.Tensor | None = None
    error: Exception | None = None


class _Tick(NamedTuple):
    began: float
    rows: int
    advances: list[_Advance]


class Denoiser:
    """Takes jobs from any thread; a job joins or leaves between any two ticks.

    Args:
        networks: predicts the noise for the rows of a tick, and for padding after them.
        mark: called after each launch; gives what waits for the device, or None where launching is computing.
    """

    def __init__(
        self,
        networks: Callable[..., torch.Tensor],
        batcher: Batcher,
        call_rows: CallRows,
        limits: Limits | None = None,
        meter: Meter | None = None,
        mark: Callable[[], Wait | None] = lambda: None,
    ) -> None:
        self._networks, self._batcher, self._call_rows, self._mark = networks, batcher, call_rows, mark
        self._limits, self._meter = limits or Limits(), meter or Meter()
        self._answer_threads = AnswerThreads()
        self._owner = ThreadPoolExecutor(1, thread_name_prefix="denoiser")
        self._launcher = ThreadPoolExecutor(1, thread_name_prefix="launch")
        self._waiter = ThreadPoolExecutor(1, thread_name_prefix="device")
        # What follows belongs to the owner's thread alone.
        self._jobs: dict[str, _Active] = {}
        self._admitted: dict[str, tuple[Load, float]] = {}
        self._cancelled: dict[str, float] = {}
        self._stopping = False
        self._launch: Future[None] | None = None
        self._in_flight: list[float] = []
        """When each tick began that has been launched, or is being launched, and is not complete."""
        self._completed = 0.0
        """When the latest tick was complete."""
        self._tick, self._tick_seconds = 0, 0.0
        self._turn = FIRST_TURN

    def admit(self, job_id: str, load: Load) -> None:
        """Keep a place in the waiting line for a job that is about to come. A second time it does nothing.

        Raises:
            Overloaded: the line is full, or the loop is stopping.
            Cancelled: the job was cancelled before it came.
            RequestError: a job of this id is active.
        """
        self._command(self._admit, job_id, load)

    def submit(self, job: LoopJob, listener: Listener) -> None:
        """Take a job; it joins at the next tick. Raises as `admit` does."""
        self._command(self._submit, job, listener)

    def check_wanted(self, job_id: str) -> None:
        """Raise `Cancelled` if the job was cancelled; asked before it is prepared."""
        self._command(self._check_wanted, job_id)

    def cancel(self, job_id: str) -> None:
        """Stop a job at once, or as soon as it comes; finished ones are not affected."""
        with suppress(Overloaded):  # stopping, which ends all jobs
            self._command(self._cancel, job_id)

    def stop(self, timeout: float | None = None) -> None:
        """End the loop and fail what is still active. After `timeout` seconds, leave a call that hangs to itself."""
        try:
            self._command(self._stop)
            idle = [thread.submit(lambda: None) for thread in (self._launcher, self._waiter)]
        except (Overloaded, RuntimeError):
            return  # stopped before
        hanging = wait_for(idle, timeout).not_done
        for thread in (self._launcher, self._waiter, self._owner):
            thread.shutdown(wait=not hanging)
        self._answer_threads.close(timeout)

    def _command(self, command: Callable[..., Any], *arguments: Any) -> Any:
        """Run `command` on the owner's thread, which never blocks, and return its result."""
        try:
            future = self._owner.submit(command, *arguments)
        except RuntimeError:  # shut down
            raise Overloaded("the server is stopping") from None
        return future.result()

    def _post(self, command: Callable[..., None], *arguments: Any) -> None:
        """Have the owner's thread run `command` later; nobody waits for it."""
        with suppress(RuntimeError):  # stopped meanwhile
            self._owner.submit(self._run_posted, command, *arguments)

    def _run_posted(self, command: Callable[..., None], *arguments: Any) -> None:
        try:
            command(*arguments)
        except Exception as error:  # a bug in the loop: fail every job rather than leave callers waiting
            logger.exception("the loop failed")
            self._launch, self._in_flight = None, []
            for active in list(self._jobs.values()):
                self._fail(active, unexpected(error))

    def _admit(self, job_id: str, load: Load) -> None:
        self._forget_old()
        if self._stopping:
            raise Overloaded("the server is stopping")
        self._check_wanted(job_id)
        if job_id in self._jobs:
            raise RequestError(f"there is a job {job_id} already")
        if job_id in self._admitted:
            return
        running, waiting = self._loads()
        seconds = max(self._tick_seconds, self._elapsed())
        try:
            check_room(load, running, waiting, call_rows=self._call_rows, tick_seconds=seconds, limits=self._limits)
        except Overloaded as error:
            self._meter.refused(error.reason)
            raise
        self._admitted[job_id] = load, time.monotonic()
        self._report_population()

    def _submit(self, job: LoopJob, listener: Listener) -> None:
        self._admit(job.id, job.load)
        del self._admitted[job.id]
        job.last_served_tick = self._tick
        self._jobs[job.id] = _Active(job, Answers(listener, self._answer_threads, self._meter))
        self._report_population()
        self._post(self._start_tick)

    def _check_wanted(self, job_id: str) -> None:
        if job_id in self._cancelled:
            raise Cancelled("cancelled by its caller")

    def _cancel(self, job_id: str) -> None:
        self._forget_old()
        self._admitted.pop(job_id, None)
        self._cancelled[job_id] = time.monotonic()
        if job_id in self._jobs:
            self._fail(self._jobs[job_id], Cancelled("cancelled by its caller"))
        self._report_population()

    def _stop(self) -> None:
        self._stopping = True
        for active in list(self._jobs.values()):
            self._fail(active, Overloaded("the server is stopping"))

    def _start_tick(self) -> None:
        """Launch the next tick, unless one is being launched or enough are in flight."""
        if self._launch is not None or len(self._in_flight) >= TICKS_IN_FLIGHT:
            return
        self._drop_late()
        parts = self._plan()
        if parts:
            self._tick += 1
            self._report_population()
            began = time.perf_counter()
            self._in_flight.append(began)
            self._launch = self._launcher.submit(self._compute_tick, began, parts)
        elif not self._jobs:
            self._batcher.forget()

    def _drop_late(self) -> None:
        now = time.monotonic()
        for active in list(self._jobs.values()):
            if active.job.deadline is not None and now > active.job.deadline:
                self._fail(active, Cancelled(f"timeout: {active.job.request.timeout:g} seconds are over"))

    def _plan(self) -> list[tuple[_Active, RowSlice]]:
        """Rows of jobs for the next tick."""
        # A job that is done stays until the device has got there.
        actives = [active for active in self._jobs.values() if not active.job.done]
        candidates = [_candidate(active.job) for active in actives]
        planned = []
        shares = plan(candidates, self._call_rows, self._turn)
        if shares:
            leader, rows = candidates[shares[0].index], sum(share.rows for share in shares)
            self._turn = self._turn.after(leader, rows, self._call_rows)
        for share in shares:
            job = actives[share.index].job
            start = job.rows - job.pending
            planned.append((actives[share.index], RowSlice(job, start, start + share.rows)))
            job.last_served_tick = self._tick
            job.started = job.started or time.monotonic()
        return planned

    @torch.inference_mode()
    def _compute_tick(self, began: float, parts: list[tuple[_Active, RowSlice]]) -> None:
        """Compute a tick (or launch it, on a device) on the launcher's thread, and pass the outcome to the owner."""
        rows = sum(part.stop - part.start for _, part in parts)
        wait = None
        try:
            advances = self._run_batch(parts)
            wait = self._mark()
        except Exception as error:
            logger.exception("a tick failed")
            advances = [_Advance(active, error=error) for active, _ in parts]
        del parts  # finished jobs are freed while the thread waits
        self._post(self._launched, _Tick(began, rows, advances), wait)

    def _run_batch(self, parts: Sequence[tuple[_Active, RowSlice]]) -> list[_Advance]:
        try:
            noise_pred = self._predict([part for _, part in parts])
        except Exception as error:
            if len(parts) == 1:
                return [_Advance(parts[0][0], error=error)]
            # One bad job must not take its neighbors along: find it by running them one at a time.
            return [advance for part in parts for advance in self._run_batch([part])]
        counts = [part.stop - part.start for _, part in parts]
        rows = noise_pred[: sum(counts)].split(counts)
        return [_advance(active, own) for (active, _), own in zip(parts, rows, strict=True)]

    def _predict(self, parts: list[RowSlice]) -> torch.Tensor:
        return self._networks(parts, self._batcher.inputs(parts))

    def _launched(self, tick: _Tick, wait: Wait | None) -> None:
        self._launch = None
        if wait is None:
            self._complete(tick)
        else:
            self._waiter.submit(self._wait_for_device, wait, tick)
            self._start_tick()

    def _wait_for_device(self, wait: Wait, tick: _Tick) -> None:
        try:
            wait()
        except Exception as error:  # an error of the device shows when it is waited for
            logger.exception("the device failed")
            tick = tick._replace(advances=[advance._replace(error=error) for advance in tick.advances])
        self._post(self._complete, tick)

    def _complete(self, tick: _Tick) -> None:
        """A tick is computed: tell the callers, and start the next one."""
        now = time.perf_counter()
        seconds = now - max(tick.began, self._completed)
        del self._in_flight[:1]
        self._completed = now
        self._tick_seconds += (seconds - self._tick_seconds) * (_RECENT if self._tick_seconds else 1.0)
        self._meter.ticked(tick.rows, seconds)
        for advance in tick.advances:
            self._tell(advance)
        self._start_tick()

    def _elapsed(self) -> float:
        """Seconds since the current tick began; the first one may take long, and there is no mean yet."""
        if not self._in_flight:
            return 0.0
        return time.perf_counter() - max(self._in_flight[0], self._completed)

    def _tell(self, advance: _Advance) -> None:
        active = advance.active
        if self._jobs.get(active.job.id) is not active:
            return  # cancelled or failed meanwhile
        if advance.error is not None:
            self._report(active, advance.error)
        elif advance.done:  # not `job.done`: later ticks may have been launched
            self._pop(active)
            active.answers.finish(active.job)
        elif advance.step is not None:
            on_error = partial(self._post, self._report, active)
            active.answers.progress(advance.step, active.job.steps, advance.preview, on_error)

    def _report(self, active: _Active, error: Exception) -> None:
        if not isinstance(error, RequestError):
            logger.error("job %s failed", active.job.id, exc_info=error)
        self._fail(active, unexpected(error))

    def _fail(self, active: _Active, error: RequestError) -> None:
        if self._pop(active):
            active.answers.fail(error)

    def _pop(self, active: _Active) -> bool:
        """Take a job out; whoever gets True gives the one final answer."""
        if self._jobs.get(active.job.id) is not active:
            return False
        del self._jobs[active.job.id]
        self._report_population()
        return True

    def _forget_old(self) -> None:
        """Places of jobs that never came, and cancellations of jobs that never will."""
        oldest = time.monotonic() - KEEP_S
        for job_id in [key for key, (_, since) in self._admitted.items() if since < oldest]:
            del self._admitted[job_id]
        for job_id in [key for key, since in self._cancelled.items() if since < oldest]:
            del self._cancelled[job_id]

    def _loads(self) -> tuple[list[Load], list[Load]]:
        """Of the jobs that have begun, and of those that have not, announced ones included."""
        jobs = [active.job for active in self._jobs.values() if not active.job.done]
        running = [job.load for job in jobs if job.started is not None]
        waiting = [job.load for job in jobs if job.started is None]
        return running, waiting + [load for load, _ in self._admitted.values()]

    def _report_population(self) -> None:
        running, waiting = self._loads()
        rows = [sum(load.rows for load in loads) for loads in (running, waiting)]
        self._meter.population(Population(len(running), rows[0], len(waiting), rows[1]))


def _candidate(job: LoopJob) -> Candidate:
    settings = job.request.settings
    return Candidate(
        batch_key=job.batch_key,
        rows=job.rows,
        pending=job.pending,
        last_served_tick=job.last_served_tick,
        begun=job.started is not None,
        priority=settings.priority,
        frames=job.frames,
        loras=lora_set(settings),
    )


def _advance(active: _Active, rows: torch.Tensor) -> _Advance:
    """Give a job its rows of the UNet's output."""
    job, before = active.job, active.job.step
    try:
        job.add_output_rows(rows)
    except Exception as error:
        return _Advance(active, error=error)
    request = job.request
    if job.done or job.step == before or not request.reports_progress or job.step % request.settings.progress_every:
        return _Advance(active, done=job.done)
    return _Advance(active, step=job.step, preview=job.predicted)
