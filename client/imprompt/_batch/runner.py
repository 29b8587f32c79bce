"""Run jobs on one server, with a bounded number in flight."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from imprompt._async_client import AsyncClient
from imprompt._batch.folder import BatchFolder
from imprompt._batch.jobs import BatchJob
from imprompt._errors import ConnectionFailed, ImpromptError, Overloaded
from imprompt._result import Result

_PAUSE_S = 2.0
"""Pause before a job is sent again to a server that is away or full."""


class ServerAway(ConnectionError):
    """The server has not finished a job for longer than the batch is willing to wait."""


@dataclass(kw_only=True, slots=True)
class Tally:
    """What a run did."""

    done: int = 0
    failed: int = 0
    skipped: int = 0
    """Jobs that an earlier run had finished."""


async def run_jobs(
    client: AsyncClient,
    jobs: Iterable[BatchJob],
    folder: BatchFolder,
    *,
    in_flight: int,
    patience_s: float,
    advance: Callable[[], None] = lambda: None,
) -> Tally:
    """Run the jobs that are not finished yet, `in_flight` at a time.

    A job that fails is recorded and does not stop the others. A server that is away or full is waited for.

    Args:
        patience_s: how long to wait for the server, in seconds.
        advance: called for each job that is finished, or was already.

    Raises:
        ServerAway: no job was finished within `patience_s`, and the server is away or full.
        OSError: the folder cannot be written to.
    """
    run = _Run(client, folder, patience_s, advance)
    waiting = iter(jobs)
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(in_flight):
                group.create_task(run.work(waiting))
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None  # the group has canceled the other workers
    return run.tally


class _Run:
    def __init__(
        self, client: AsyncClient, folder: BatchFolder, patience_s: float, advance: Callable[[], None]
    ) -> None:
        self._client, self._folder, self._patience_s, self._advance = client, folder, patience_s, advance
        self._last_answer = time.monotonic()
        self.tally = Tally()

    async def work(self, jobs: Iterator[BatchJob]) -> None:
        """Take jobs until there are none. The workers of a run share the iterator."""
        for job in jobs:
            if self._folder.is_done(job):
                self.tally.skipped += 1
            else:
                await self._run(job)
            self._advance()

    async def _run(self, job: BatchJob) -> None:
        try:
            result = await self._generate(job)
            await asyncio.to_thread(self._folder.save, job, result)
            self.tally.done += 1
        except ImpromptError as error:
            self._folder.fail(job, error)
            self.tally.failed += 1

    async def _generate(self, job: BatchJob) -> Result:
        while True:
            try:
                result = await self._client.generate(**job.arguments)
            except (ConnectionFailed, Overloaded) as error:
                # `Client` has already tried several times.
                if time.monotonic() - self._last_answer > self._patience_s:
                    raise ServerAway(f"no job was finished for {self._patience_s:g} s: {error}") from error
                await asyncio.sleep(_PAUSE_S)
            except ImpromptError:
                self._last_answer = time.monotonic()
                raise
            else:
                self._last_answer = time.monotonic()
                return result
