"""Run a batch as a Ray Data job (https://docs.ray.io/en/latest/data/data.html).

The dataset has one row per chunk of the job file. Actors read the lines of a chunk themselves, run them, and write
results to the shared folder. When a node dies, Ray runs the chunks of its actors elsewhere, and finished jobs are
skipped there.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from imprompt._async_client import AsyncClient
from imprompt._batch.folder import BatchFolder
from imprompt._batch.jobs import Chunk, JobFile
from imprompt._batch.runner import Tally, run_jobs

CHUNK_LINES = 32
"""Lines of a chunk: enough to keep the requests of a server overlapping, few enough to spread over servers."""
BLOCKS = 1000
"""Most tasks that the chunks are divided into; each costs Ray some memory for as long as the job runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """The actors of a job."""

    count: int
    gpus: float
    """GPUs for each actor; Ray sets CUDA_VISIBLE_DEVICES."""
    repository: Path | None
    """Model repository that each actor serves, on every node under this path; None for the server of `connection`."""
    connection: Mapping[str, Any]
    """Arguments of `AsyncClient`."""
    in_flight: int
    patience_s: float


class BatchWorker:
    """A Ray actor with a server of its own, or a connection to a shared one."""

    def __init__(self, file: JobFile, folder: BatchFolder, workers: Workers) -> None:
        self._file, self._folder, self._workers = file, folder, workers
        self._resources = ExitStack()
        self._connection = dict(workers.connection)
        if workers.repository is not None:
            launcher = importlib.import_module("imprompt_serving.launcher")  # callers install without it
            self._connection["url"] = self._resources.enter_context(launcher.Server(workers.repository)).grpc_address

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, list[int]]:
        """Run chunks, given as columns of `Chunk`, and return the columns of `Tally` and the number of jobs."""
        chunks = [Chunk(*map(int, row)) for row in zip(*(batch[name] for name in Chunk._fields), strict=True)]
        tallies = [asdict(asyncio.run(self._run(chunk))) for chunk in chunks]
        return {name: [tally[name] for tally in tallies] for name in tallies[0]}

    async def _run(self, chunk: Chunk) -> Tally:
        async with AsyncClient(**self._connection) as client:
            return await run_jobs(
                client,
                self._file.jobs_of(chunk),
                self._folder,
                in_flight=self._workers.in_flight,
                patience_s=self._workers.patience_s,
            )

    def __del__(self) -> None:
        self._resources.close()


def run_on_ray(
    file: JobFile, folder: BatchFolder, workers: Workers, *, address: str | None, advance: Callable[[int], None]
) -> Tally:
    """Run the jobs of a file that has been checked.

    Args:
        address: of the cluster; None for the one that RAY_ADDRESS names, or else a new one on this machine.
        advance: called with the number of jobs whenever a chunk is finished.
    """
    import ray
    import ray.data

    ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    chunks = [chunk._asdict() for chunk in file.chunks(CHUNK_LINES)]
    finished = ray.data.from_items(chunks, override_num_blocks=min(len(chunks), BLOCKS)).map_batches(
        BatchWorker,
        fn_constructor_args=(file, folder, workers),
        batch_size=1,
        num_gpus=workers.gpus,
        compute=ray.data.ActorPoolStrategy(size=workers.count),
    )
    total = Tally()
    for row in finished.iter_rows():
        total.done += row["done"]
        total.failed += row["failed"]
        total.skipped += row["skipped"]
        advance(row["done"] + row["failed"] + row["skipped"])
    return total
