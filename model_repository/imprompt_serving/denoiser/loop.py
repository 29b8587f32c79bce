"""The denoiser: continuous batching of the steps of all active jobs.

One thread owns the jobs. It runs commands (admit, submit, cancel, stop) one at a time, and no command blocks. A second
thread computes ticks: a call of the engines, then a step of each job's own scheduler. On a GPU it only launches them,
and a third thread waits for the device. At most two ticks are in flight, so that new jobs, cancellations, and deadlines
take effect within two ticks, and measured times are those of the device.
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
from imprompt_serving.denoiser.policy import CANARY_PRIORITY, FIRST_TURN, Candidate, plan
from imprompt_serving.denoiser.protocol import LoopJob
from imprompt_serving.errors import Cancelled, DeadlineExceeded, Overloaded, RequestError, unexpected
from imprompt_serving.specs import CallRows, Limits

logger = logging.getLogger(__name__)

KEEP_S = 300.0
"""How long to keep the place of an admitted job, and to remember a cancelled id whose job may still arrive."""
TICKS_IN_FLIGHT = 2
"""The limit of launched, incomplete ticks. With one, the device would idle while the next tick is launched."""
_LATEST_WEIGHT = 0.2
"""Weight of the latest tick in the moving average of tick seconds."""

Wait = Callable[[], None]
"""Blocks until the device has finished everything that had been launched when this function was made."""


@dataclass(slots=True)
class _Active:
    """A job in the loop, and its answers."""

    job: LoopJob
    answers: Answers


class _Update(NamedTuple):
    """What a tick did for one job."""

    active: _Active
    done: bool = False
    step: int | None = None
    """The number of finished steps, if the job wants to report it now."""
    preview: torch.Tensor | None = None
    error: Exception | None = None


class _Tick(NamedTuple):
    """A tick that has been launched."""

    began: float
    rows: int
    updates: list[_Update]


class Denoiser:
    """Accepts jobs from any thread. A job joins or leaves between any two ticks.

    Args:
        networks: predicts the noise for the rows of a tick, and for padding after them.
        batcher: stacks the rows of a tick.
        call_rows: the numbers of rows that calls have.
        limits: limits of the queue.
        meter: receives metrics.
        record_launch: called after each launch; returns a function that waits for the device, or None if everything
            launched is already computed, as on a CPU.
    """

    def __init__(
        self,
        networks: Callable[..., torch.Tensor],
        batcher: Batcher,
        call_rows: CallRows,
        limits: Limits | None = None,
        meter: Meter | None = None,
        record_launch: Callable[[], Wait | None] = lambda: None,
    ) -> None:
        self._networks, self._batcher, self._call_rows = networks, batcher, call_rows
        self._record_launch = record_launch
        self._limits, self._meter = limits or Limits(), meter or Meter()
        self._answer_threads = AnswerThreads()
        self._owner = ThreadPoolExecutor(1, thread_name_prefix="denoiser")
        self._launcher = ThreadPoolExecutor(1, thread_name_prefix="launch")
        self._waiter = ThreadPoolExecutor(1, thread_name_prefix="device")
        # Only the owner's thread uses the following fields.
        self._jobs: dict[str, _Active] = {}
        self._admitted: dict[str, tuple[Load, float]] = {}
        self._cancelled: dict[str, float] = {}
        self._stopping = False
        self._launch: Future[None] | None = None
        self._in_flight: list[float] = []
        """The start time of each incomplete tick."""
        self._last_completed = 0.0
        """When the latest tick completed."""
        self._tick, self._tick_seconds = 0, 0.0
        self._turn = FIRST_TURN

    def admit(self, job_id: str, load: Load) -> None:
        """Reserve a place in the queue for a job that is about to arrive. Further calls for the same job do nothing.

        Raises:
            Overloaded: the queue is full, or the loop is stopping.
            Cancelled: the job was cancelled before it arrived.
            RequestError: a job with this id is active.
        """
        self._command(self._admit, job_id, load)

    def submit(self, job: LoopJob, listener: Listener) -> None:
        """Submit a job, which joins at the next tick. Raises the same errors as `admit`."""
        self._command(self._submit, job, listener)

    def check_not_cancelled(self, job_id: str) -> None:
        """Raise `Cancelled` if the job was cancelled. Call this before preparing a job."""
        self._command(self._check_not_cancelled, job_id)

    def cancel(self, job_id: str) -> None:
        """Cancel a job at once, or as soon as it arrives. Finished jobs are not affected."""
        with suppress(Overloaded):  # the loop is stopping, which ends all jobs
            self._command(self._cancel, job_id)

    def stop(self, timeout: float | None = None) -> None:
        """End the loop and fail all active jobs. Wait at most `timeout` seconds for a call that hangs."""
        try:
            self._command(self._stop)
            idle = [thread.submit(lambda: None) for thread in (self._launcher, self._waiter)]
        except (Overloaded, RuntimeError):
            return  # already stopped
        hanging = wait_for(idle, timeout).not_done
        for thread in (self._launcher, self._waiter, self._owner):
            thread.shutdown(wait=not hanging)
        self._answer_threads.close(timeout)

    def _command(self, command: Callable[..., Any], *arguments: Any) -> Any:
        """Run `command` on the owner's thread and return its result. The owner never blocks, so this is quick."""
        try:
            future = self._owner.submit(command, *arguments)
        except RuntimeError:  # shut down
            raise Overloaded("the server is stopping") from None
        return future.result()

    def _post(self, command: Callable[..., None], *arguments: Any) -> None:
        """Queue `command` for the owner's thread without waiting for it."""
        with suppress(RuntimeError):  # stopped in the meantime
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
        self._check_not_cancelled(job_id)
        if job_id in self._jobs:
            raise RequestError(f"a job with the id {job_id} is already active")
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
        if _is_canary(job):
            meter = Meter()  # canaries are not traffic: they need no place in the queue, and appear in no metric
        else:
            self._admit(job.id, job.load)
            del self._admitted[job.id]
            meter = self._meter
        job.last_served_tick = self._tick
        self._jobs[job.id] = _Active(job, Answers(listener, self._answer_threads, meter))
        self._report_population()
        self._post(self._start_tick)

    def _check_not_cancelled(self, job_id: str) -> None:
        if job_id in self._cancelled:
            raise Cancelled("canceled by the caller")

    def _cancel(self, job_id: str) -> None:
        self._forget_old()
        self._admitted.pop(job_id, None)
        self._cancelled[job_id] = time.monotonic()
        if job_id in self._jobs:
            self._fail(self._jobs[job_id], Cancelled("canceled by the caller"))
        self._report_population()

    def _stop(self) -> None:
        self._stopping = True
        for active in list(self._jobs.values()):
            self._fail(active, Overloaded("the server is stopping"))

    def _start_tick(self) -> None:
        """Launch the next tick, unless one is being launched or the limit of ticks in flight is reached."""
        if self._launch is not None or len(self._in_flight) >= TICKS_IN_FLIGHT:
            return
        self._fail_overdue()
        planned = self._plan()
        if planned:
            self._tick += 1
            self._report_population()
            began = time.perf_counter()
            self._in_flight.append(began)
            self._launch = self._launcher.submit(self._compute_tick, began, planned)
        elif not self._jobs:
            self._batcher.forget()

    def _fail_overdue(self) -> None:
        now = time.monotonic()
        for active in list(self._jobs.values()):
            if active.job.deadline is not None and now > active.job.deadline:
                self._fail(active, DeadlineExceeded(active.job.request.timeout or 0.0))

    def _plan(self) -> list[tuple[_Active, RowSlice]]:
        """Choose the rows of the next tick."""
        # A job whose last step has been launched stays in the loop until the device has finished it.
        actives = [active for active in self._jobs.values() if not active.job.done]
        candidates = [_candidate(active.job) for active in actives]
        planned = []
        grants = plan(candidates, self._call_rows, self._turn)
        if grants:
            leader, rows = candidates[grants[0].index], sum(grant.rows for grant in grants)
            self._turn = self._turn.after(leader, rows, self._call_rows)
        for grant in grants:
            job = actives[grant.index].job
            start = job.rows - job.pending
            planned.append((actives[grant.index], RowSlice(job, start, start + grant.rows)))
            job.last_served_tick = self._tick
            job.started = job.started or time.monotonic()
        return planned

    @torch.inference_mode()
    def _compute_tick(self, began: float, planned: list[tuple[_Active, RowSlice]]) -> None:
        """Compute a tick on the launcher's thread (on a device, launch it), and pass the outcome to the owner."""
        rows = sum(part.stop - part.start for _, part in planned)
        wait = None
        try:
            updates = self._run_batch(planned)
            wait = self._record_launch()
        except Exception as error:
            logger.exception("a tick failed")
            updates = [_Update(active, error=error) for active, _ in planned]
        del planned  # so that finished jobs can be freed while this thread is idle
        self._post(self._launched, _Tick(began, rows, updates), wait)

    def _run_batch(self, planned: Sequence[tuple[_Active, RowSlice]]) -> list[_Update]:
        """Run the networks on the planned rows, then the schedulers of their jobs."""
        slices = [part for _, part in planned]
        try:
            noise_pred = self._networks(slices, self._batcher.inputs(slices))
        except Exception as error:
            if len(planned) == 1:
                return [_Update(planned[0][0], error=error)]
            # One faulty job must not fail the others: run the jobs one at a time to find it.
            return [update for one in planned for update in self._run_batch([one])]
        counts = [part.stop - part.start for part in slices]
        rows = noise_pred[: sum(counts)].split(counts)
        return [_advance(active, own) for (active, _), own in zip(planned, rows, strict=True)]

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
        except Exception as error:  # errors on the device surface here
            logger.exception("the device failed")
            tick = tick._replace(updates=[update._replace(error=error) for update in tick.updates])
        self._post(self._complete, tick)

    def _complete(self, tick: _Tick) -> None:
        """Answer the callers of a tick that is computed, and start the next one."""
        now = time.perf_counter()
        seconds = now - max(tick.began, self._last_completed)
        del self._in_flight[:1]
        self._last_completed = now
        if not all(_is_canary(update.active.job) for update in tick.updates):
            self._tick_seconds += (seconds - self._tick_seconds) * (_LATEST_WEIGHT if self._tick_seconds else 1.0)
            self._meter.ticked(tick.rows, seconds)
        for update in tick.updates:
            self._answer(update)
        self._start_tick()

    def _elapsed(self) -> float:
        """Return the seconds since the current tick began. The first tick may be slow, and there is no average yet."""
        if not self._in_flight:
            return 0.0
        return time.perf_counter() - max(self._in_flight[0], self._last_completed)

    def _answer(self, update: _Update) -> None:
        active = update.active
        if self._jobs.get(active.job.id) is not active:
            return  # cancelled or failed in the meantime
        if update.error is not None:
            self._fail_with(active, update.error)
        elif update.done:  # not `job.done`: later ticks may have been launched
            self._remove(active)
            active.answers.finish(active.job)
        elif update.step is not None:
            on_error = partial(self._post, self._fail_with, active)
            active.answers.progress(update.step, active.job.steps, update.preview, on_error)

    def _fail_with(self, active: _Active, error: Exception) -> None:
        """Fail a job with an error of any kind, and log unexpected ones."""
        if not isinstance(error, RequestError):
            logger.error("job %s failed", active.job.id, exc_info=error)
        self._fail(active, unexpected(error))

    def _fail(self, active: _Active, error: RequestError) -> None:
        if self._remove(active):
            active.answers.fail(error)

    def _remove(self, active: _Active) -> bool:
        """Remove a job from the loop. Only a caller that gets True may send the job's final answer."""
        if self._jobs.get(active.job.id) is not active:
            return False
        del self._jobs[active.job.id]
        self._report_population()
        return True

    def _forget_old(self) -> None:
        """Drop the places of jobs that never arrived, and cancellations of jobs that never will."""
        oldest = time.monotonic() - KEEP_S
        for job_id in [key for key, (_, since) in self._admitted.items() if since < oldest]:
            del self._admitted[job_id]
        for job_id in [key for key, since in self._cancelled.items() if since < oldest]:
            del self._cancelled[job_id]

    def _loads(self) -> tuple[list[Load], list[Load]]:
        """Return the loads of the running jobs, and of the waiting ones, which include admitted jobs."""
        jobs = [active.job for active in self._jobs.values() if not (active.job.done or _is_canary(active.job))]
        running = [job.load for job in jobs if job.started is not None]
        waiting = [job.load for job in jobs if job.started is None]
        return running, waiting + [load for load, _ in self._admitted.values()]

    def _report_population(self) -> None:
        running, waiting = self._loads()
        rows = [sum(load.rows for load in loads) for loads in (running, waiting)]
        self._meter.population(Population(len(running), rows[0], len(waiting), rows[1]))


def _is_canary(job: LoopJob) -> bool:
    return job.request.settings.priority == CANARY_PRIORITY


def _candidate(job: LoopJob) -> Candidate:
    return Candidate(
        batch_key=job.batch_key,
        rows=job.rows,
        pending=job.pending,
        last_served_tick=job.last_served_tick,
        started=job.started is not None,
        priority=job.request.settings.priority,
        frames=job.frames,
        loras=job.loras,
    )


def _advance(active: _Active, rows: torch.Tensor) -> _Update:
    """Give a job its rows of the UNet's output."""
    job, before = active.job, active.job.step
    try:
        job.add_output_rows(rows)
    except Exception as error:
        return _Update(active, error=error)
    request = job.request
    if job.done or job.step == before or not request.reports_progress or job.step % request.settings.progress_every:
        return _Update(active, done=job.done)
    return _Update(active, step=job.step, preview=job.predicted)
