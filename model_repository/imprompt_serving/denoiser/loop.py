"""The loop that owns all active jobs: one engine call a tick, then each job's own scheduler."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from imprompt_serving.denoiser.batch import Batcher, Part
from imprompt_serving.denoiser.job import Job
from imprompt_serving.denoiser.line import Load, check_room
from imprompt_serving.denoiser.meter import Meter, Population
from imprompt_serving.denoiser.policy import Candidate, plan
from imprompt_serving.errors import Cancelled, Overloaded, RequestError, unexpected
from imprompt_serving.specs import Limits

logger = logging.getLogger(__name__)

KEEP_S = 300.0
"""How long a place is kept for a job that was admitted, and a cancelled id is remembered for a job on its way."""
_RECENT = 0.2
"""Weight of the latest tick in the mean of tick seconds."""


class Listener:
    """Who hears of a job: any number of ``progress`` calls, then exactly one of ``finish`` and ``fail``.

    All are called in a thread of their own, in order. ``progress`` gets the steps done, the steps in all, and the
    picture as the UNet sees it so far (latents) if the job asks for previews.
    """

    def __init__(
        self,
        progress: Callable[[int, int, torch.Tensor | None], None],
        finish: Callable[[Job], None],
        fail: Callable[[RequestError], None],
    ) -> None:
        self.progress, self.finish, self.fail = progress, finish, fail


class Outcome(Listener):
    """A listener for who waits for the end: ``ended`` is set then, and ``error`` is what went wrong, if anything."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.error: RequestError | None = None
        super().__init__(lambda *_: None, lambda _: self.ended.set(), self._failed)

    def _failed(self, error: RequestError) -> None:
        self.error = error
        self.ended.set()


class Denoiser:
    """Continuous batching of denoising steps: a job joins or leaves between any two ticks."""

    def __init__(
        self,
        networks: Callable[..., torch.Tensor],
        batcher: Batcher,
        max_rows: int,
        limits: Limits | None = None,
        meter: Meter | None = None,
    ) -> None:
        self._networks, self._batcher, self._max_rows = networks, batcher, max_rows
        self._limits, self._meter = limits or Limits(), meter or Meter()
        self._jobs: dict[str, tuple[Job, Listener]] = {}
        self._admitted: dict[str, tuple[Load, float]] = {}
        self._cancelled: dict[str, float] = {}
        self._changed = threading.Condition()
        self._stopping = False
        self._tick, self._tick_seconds = 0, 0.0
        self._tick_began: float | None = None
        self._telling: set[str] = set()
        self._answers = ThreadPoolExecutor(1, thread_name_prefix="answers")
        self._thread = threading.Thread(target=self._run, name="denoiser", daemon=True)
        self._thread.start()

    def admit(self, job_id: str, load: Load) -> None:
        """Keep a place in the waiting line for a job that is about to come. A second time it does nothing.

        Raises:
            Overloaded: the line is full, or the loop is stopping.
            Cancelled: the job was cancelled before it came.
            RequestError: a job of this id is active.
        """
        with self._changed:
            self._forget_old()
            if self._stopping:
                raise Overloaded("the server is stopping")
            if job_id in self._cancelled:
                raise Cancelled("cancelled by its caller")
            if job_id in self._jobs:
                raise RequestError(f"there is a job {job_id} already")
            if job_id in self._admitted:
                return
            running, waiting = self._loads()
            try:
                check_room(
                    load,
                    running,
                    waiting,
                    call_rows=self._max_rows,
                    tick_seconds=max(self._tick_seconds, self._elapsed()),
                    limits=self._limits,
                )
            except Overloaded as error:
                self._meter.refused(error.reason)
                raise
            self._admitted[job_id] = load, time.monotonic()
            self._report_population()

    def submit(self, job: Job, listener: Listener) -> None:
        """Take a job; it joins at the next tick. Raises as ``admit`` does."""
        with self._changed:
            self.admit(job.id, job.load)
            del self._admitted[job.id]
            job.since = self._tick
            self._jobs[job.id] = (job, listener)
            self._report_population()
            self._changed.notify()

    def check_wanted(self, job_id: str) -> None:
        """Before a job is prepared. Raises ``Cancelled`` if it was."""
        with self._changed:
            if job_id in self._cancelled:
                raise Cancelled("cancelled by its caller")

    def cancel(self, job_id: str) -> None:
        """Stop a job within one tick, or as soon as it comes; finished ones are not affected."""
        with self._changed:
            self._forget_old()
            self._admitted.pop(job_id, None)
            self._cancelled[job_id] = time.monotonic()
            self._report_population()
            self._changed.notify()

    def stop(self, timeout: float | None = None) -> None:
        """End the loop and fail what is still active. After `timeout` seconds, leave a call that hangs to itself."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout)

    @torch.inference_mode()
    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._jobs and not self._stopping:
                    self._batcher.forget()
                    self._changed.wait()
                if self._stopping:
                    break
            try:
                self._turn()
            except Exception as error:  # a fault of the loop itself: nobody may wait for an answer that never comes
                logger.exception("a tick failed")
                for job_id in list(self._jobs):
                    self._fail(job_id, unexpected(error))
        for job_id in list(self._jobs):
            self._fail(job_id, Overloaded("the server is stopping"))
        self._answers.shutdown()

    def _turn(self) -> None:
        """One tick. Its references to jobs end with it, so that finished ones are freed while the loop waits."""
        self._drop_ended()
        with self._changed:
            active = [job for job, _ in self._jobs.values()]
        if not active:
            return
        self._tick_began = time.perf_counter()
        rows = self._serve(active)
        seconds = self._elapsed()
        self._tick_began = None
        self._tick_seconds += (seconds - self._tick_seconds) * (_RECENT if self._tick_seconds else 1.0)
        self._meter.ticked(rows, seconds)

    def _elapsed(self) -> float:
        """Seconds since the current tick began; the first one may take long, and there is no mean yet."""
        began = self._tick_began
        return 0.0 if began is None else time.perf_counter() - began

    def _drop_ended(self) -> None:
        now = time.monotonic()
        with self._changed:
            jobs = [job for job, _ in self._jobs.values()]
            cancelled = self._cancelled.keys() & self._jobs.keys()
        for job in jobs:
            if job.id in cancelled:
                self._fail(job.id, Cancelled("cancelled by its caller"))
            elif job.deadline is not None and now > job.deadline:
                self._fail(job.id, Cancelled(f"timeout: {job.request.timeout:g} seconds are over"))

    def _serve(self, active: list[Job]) -> int:
        """Compute the next call; returns its rows."""
        candidates = [
            Candidate(
                job.key, job.rows, job.pending, job.since, job.started is not None, job.request.priority, job.frames
            )
            for job in active
        ]
        parts = []
        for share in plan(candidates, self._max_rows):
            job = active[share.index]
            start = job.rows - job.pending
            parts.append(Part(job, start, start + share.rows))
            job.since = self._tick
            job.started = job.started or time.monotonic()
        self._tick += 1
        with self._changed:
            self._report_population()
        try:
            self._compute(parts)
        except Exception as error:
            if len(parts) == 1:
                self._report(parts[0].job, error)
            else:
                # One bad job must not take its neighbours along: find it by running them one at a time.
                for part in parts:
                    with self._failing(part.job):
                        self._compute([part])
        return sum(part.stop - part.start for part in parts)

    def _compute(self, parts: list[Part]) -> None:
        inputs = self._batcher.inputs(parts)
        noise_pred = self._networks(parts, inputs)
        for part, rows in zip(parts, noise_pred.split([part.stop - part.start for part in parts]), strict=True):
            with self._failing(part.job):
                self._advance(part.job, rows)

    def _advance(self, job: Job, rows: torch.Tensor) -> None:
        before = job.step
        job.fill(rows)
        if job.done:
            self._finish(job.id)
        elif job.step > before and job.request.progress_every and job.step % job.request.progress_every == 0:
            _, listener = self._jobs.get(job.id, (None, None))
            if listener is not None:
                # Previews may take longer than a tick: one at a time, or they would pile up.
                preview = None if job.id in self._telling else job.predicted
                self._telling.add(job.id)
                self._answers.submit(self._progress, job, listener, job.step, job.steps, preview)

    def _progress(self, job: Job, listener: Listener, *arguments: Any) -> None:
        with self._failing(job):
            listener.progress(*arguments)
        self._telling.discard(job.id)

    @contextmanager
    def _failing(self, job: Job) -> Iterator[None]:
        """What goes wrong within ends ``job``, and it alone."""
        try:
            yield
        except Exception as error:
            self._report(job, error)

    def _report(self, job: Job, error: Exception) -> None:
        if not isinstance(error, RequestError):
            logger.error("job %s failed", job.id, exc_info=error)
            error = unexpected(error)
        self._fail(job.id, error)

    def _finish(self, job_id: str) -> None:
        ended = self._pop(job_id)
        if ended is not None:
            self._answers.submit(self._tell_finished, *ended)

    def _tell_finished(self, job: Job, listener: Listener) -> None:
        try:
            listener.finish(job)
            self._meter.ended("finished")
        except Exception as error:
            logger.exception("the result of job %s was not taken", job.id)
            self._tell_failed(listener, unexpected(error))

    def _fail(self, job_id: str, error: RequestError) -> None:
        ended = self._pop(job_id)
        if ended is not None:
            self._answers.submit(self._tell_failed, ended[1], error)

    def _tell_failed(self, listener: Listener, error: RequestError) -> None:
        self._meter.ended("cancelled" if isinstance(error, Cancelled) else "failed")
        try:
            listener.fail(error)
        except Exception:
            logger.exception("nobody took the news that a job ended: %s", error)

    def _pop(self, job_id: str) -> tuple[Job, Listener] | None:
        """Take a job out; whoever gets it gives the one final answer."""
        with self._changed:
            ended = self._jobs.pop(job_id, None)
            self._report_population()
            return ended

    def _forget_old(self) -> None:
        """Places of jobs that never came, and cancellations of jobs that never will."""
        oldest = time.monotonic() - KEEP_S
        for job_id in [key for key, (_, since) in self._admitted.items() if since < oldest]:
            del self._admitted[job_id]
        for job_id in [key for key, since in self._cancelled.items() if since < oldest]:
            del self._cancelled[job_id]

    def _loads(self) -> tuple[list[Load], list[Load]]:
        """Of the jobs that have begun, and of those that have not, announced ones included, cancelled ones not."""
        jobs = [job for job, _ in self._jobs.values() if job.id not in self._cancelled]
        running = [job.load for job in jobs if job.started is not None]
        waiting = [job.load for job in jobs if job.started is None]
        return running, waiting + [load for load, _ in self._admitted.values()]

    def _report_population(self) -> None:
        running, waiting = self._loads()
        rows = [sum(load.rows for load in loads) for loads in (running, waiting)]
        self._meter.population(Population(len(running), rows[0], len(waiting), rows[1]))
