"""Faults inside the models of a server: engines that fail, and a clock that somebody sets."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from faults.known import KnownPictures, RetryingCallers
from faults.server import Foreground, modified, wait_for
from imprompt import Client, ServerError

POISON = {1001: "ServerError", 1002: "RuntimeError", 1003: "OutOfMemoryError"}
"""What the log calls the errors of jobs by seed: their rows become NaN, their call fails, or runs out of memory."""
FAILING_ENGINE = """
import torch
from imprompt_serving.triton import denoiser

loop = denoiser.Denoiser

def with_failing_engine(networks, *others):
    def run(slices, inputs):
        seeds = [part.job.request.seeds[0] for part in slices]
        if 1002 in seeds:
            raise RuntimeError("poisoned")
        if 1003 in seeds:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        rows, done = networks(slices, inputs), 0
        for part, seed in zip(slices, seeds):
            if seed == 1001:
                rows[done : done + part.stop - part.start] = torch.nan
            done += part.stop - part.start
        return rows

    return loop(run, *others)

denoiser.Denoiser = with_failing_engine
"""
CLOCK_VARIABLE = "IMPROMPT_TEST_CLOCK"
CLOCK = f"""
import os, time
from pathlib import Path

real, offset = time.time, Path(os.environ["{CLOCK_VARIABLE}"])
time.time = lambda: real() + float(offset.read_text() or 0)
"""
DAY_S = 86_400


@contextmanager
def failing_engine(repository: Path, folder: Path) -> Iterator[Foreground]:
    """Serve with an engine that fails for the seeds of `POISON`."""

    def change(model: str, text: str) -> str:
        return FAILING_ENGINE + text if model.endswith("_denoiser") else text

    with Foreground(modified(repository, folder / "repository", change)) as server:
        yield server


@contextmanager
def movable_clock(repository: Path, folder: Path) -> Iterator[Foreground]:
    """Serve with a clock that `set_clock` can set, in the launcher, the gateway, and the models."""
    (folder / "sitecustomize.py").write_text(CLOCK)
    (folder / "offset").write_text("0")
    changed = modified(repository, folder / "repository", lambda model, text: CLOCK + text)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    environment = {CLOCK_VARIABLE: str(folder / "offset"), "PYTHONPATH": path}
    with Foreground(changed, **environment) as server:
        yield server


def poisoned_jobs(server: Foreground, held: ExitStack) -> None:
    """Run jobs that fail in the engine, in the same calls as others, whose pictures are known."""
    bundle = next(iter(server.health()[1]["bundles"]))
    known = KnownPictures(server.addresses["grpc"], bundle)
    neighbors = RetryingCallers(known, server.addresses["grpc"], count=4, seed=0)

    def fail(seed: int) -> str:
        with Client(server.addresses["grpc"], max_retries=0) as client:
            try:
                client.generate(model=bundle, prompt="x", seed=seed, num_inference_steps=6)
            except ServerError as error:
                return str(error.request_id)
        raise AssertionError(f"the seed {seed} made a picture")

    seeds = list(POISON) * 5
    with ThreadPoolExecutor(3) as threads:
        ids = list(threads.map(fail, seeds))
    assert neighbors.stop() == 0
    assert neighbors.tally.pictures, neighbors.tally
    assert not [*neighbors.tally.wrong, *neighbors.tally.lost, *neighbors.tally.resent], neighbors.tally
    for request_id, seed in zip(ids, seeds, strict=True):
        line = wait_for(partial(server.line_with, f'"request_id":"{request_id}"'), 10, "the line of the request")
        assert json.loads(line)["error"] == POISON[seed], line
        if POISON[seed] != "ServerError":
            assert server.line_with(f"job {request_id}-"), "the denoiser's error has the id"


def set_clock(server: Foreground, held: ExitStack) -> None:
    """Set the clock a day ahead, and then a day back. Requests with a timeout must still get their pictures."""
    bundle = next(iter(server.health()[1]["bundles"]))
    offset = Path(server.launcher.environ()[CLOCK_VARIABLE])
    with Client(server.addresses["grpc"], max_retries=0) as client:
        for seconds in (DAY_S, -DAY_S):
            offset.write_text(str(seconds))
            for _ in range(5):
                client.generate(model=bundle, prompt="x", num_inference_steps=6, timeout=60.0)
