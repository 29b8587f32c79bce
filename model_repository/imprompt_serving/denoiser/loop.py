"""The loop that owns all active jobs: one engine call a tick, then each job's own scheduler."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import torch

from imprompt_serving.denoiser.batch import Batcher, Part
from imprompt_serving.denoiser.job import Job
from imprompt_serving.denoiser.policy import Candidate, plan
from imprompt_serving.errors import Cancelled, RequestError

logger = logging.getLogger(__name__)


class Listener:
    """Who hears of a job: any number of ``progress`` calls, then exactly one of ``finish`` and ``fail``."""

    def __init__(
        self,
        progress: Callable[[Job], None],
        finish: Callable[[Job], None],
        fail: Callable[[RequestError], None],
    ) -> None:
        self.progress, self.finish, self.fail = progress, finish, fail


class Denoiser:
    """Continuous batching of denoising steps: a job joins or leaves between any two ticks."""

    def __init__(self, networks: Callable[..., torch.Tensor], batcher: Batcher, max_rows: int) -> None:
        self._networks, self._batcher, self._max_rows = networks, batcher, max_rows
        self._jobs: dict[str, tuple[Job, Listener]] = {}
        self._cancelled: set[str] = set()
        self._changed = threading.Condition()
        self._stopping = False
        self._tick = 0
        self._thread = threading.Thread(target=self._run, name="denoiser", daemon=True)
        self._thread.start()

    def submit(self, job: Job, listener: Listener) -> None:
        """Take a job; it joins at the next tick."""
        with self._changed:
            self._jobs[job.id] = (job, listener)
            self._changed.notify()

    def cancel(self, job_id: str) -> None:
        """Stop a job within one tick; unknown ids (finished meanwhile) are ignored."""
        with self._changed:
            if job_id in self._jobs:
                self._cancelled.add(job_id)
                self._changed.notify()

    def stop(self) -> None:
        """End the loop; what is still active is told so."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @torch.inference_mode()
    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._jobs and not self._stopping:
                    self._batcher.forget()
                    self._changed.wait()
                if self._stopping:
                    break
            self._drop_ended()
            active = [job for job, _ in self._jobs.copy().values()]
            if active:
                self._serve(active)
        for job_id in list(self._jobs):
            self._end(job_id, lambda _, listener: listener.fail(Cancelled("the server is stopping")))

    def _drop_ended(self) -> None:
        now = time.monotonic()
        with self._changed:
            cancelled, self._cancelled = self._cancelled, set()
            jobs = list(self._jobs.values())
        for job, _ in jobs:
            if job.id in cancelled:
                self._fail(job.id, Cancelled("cancelled by its caller"))
            elif job.deadline is not None and now > job.deadline:
                self._fail(job.id, Cancelled(f"timeout: {job.request.timeout:g} seconds are over"))

    def _serve(self, active: list[Job]) -> None:
        candidates = [Candidate(job.key, job.pending, job.served, job.arrived) for job in active]
        parts = []
        for share in plan(candidates, self._max_rows):
            job = active[share.index]
            start = job.rows - job.pending
            parts.append(Part(job, start, start + share.rows))
            job.served = self._tick
            job.started = job.started or time.monotonic()
        self._tick += 1
        try:
            self._compute(parts)
        except Exception as error:
            if len(parts) == 1:
                self._report(parts[0].job, error)
                return
            # One bad job must not take its neighbours along: find it by running them one at a time.
            for part in parts:
                try:
                    self._compute([part])
                except Exception as alone:
                    self._report(part.job, alone)

    def _compute(self, parts: list[Part]) -> None:
        inputs = self._batcher.inputs(parts)
        noise_pred = self._networks(parts, inputs)
        for part, rows in zip(parts, noise_pred.split([part.stop - part.start for part in parts]), strict=True):
            try:
                self._advance(part.job, rows)
            except Exception as error:
                self._report(part.job, error)

    def _advance(self, job: Job, rows: torch.Tensor) -> None:
        before = job.step
        job.fill(rows)
        if job.done:
            self._end(job.id, lambda job, listener: listener.finish(job))
        elif job.step > before and job.request.progress_every and job.step % job.request.progress_every == 0:
            self._jobs[job.id][1].progress(job)

    def _report(self, job: Job, error: Exception) -> None:
        if not isinstance(error, RequestError):
            logger.error("job %s failed", job.id, exc_info=error)
            error = RequestError(f"{type(error).__name__}: {error}")
        self._fail(job.id, error)

    def _fail(self, job_id: str, error: RequestError) -> None:
        self._end(job_id, lambda _, listener: listener.fail(error))

    def _end(self, job_id: str, tell: Callable[[Job, Listener], None]) -> None:
        with self._changed:
            ended = self._jobs.pop(job_id, None)
            self._cancelled.discard(job_id)
        if ended is not None:
            tell(*ended)
