"""Random arrivals of requests with mixed lengths, some of them canceled."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import pytest

from imprompt import Progress, Result
from served import Served
from tiny import images
from tiny.oracle import picture_distance

REQUESTS, CANCELLED_SHARE, RATE_PER_S = 30, 0.2, 8.0
SCHEDULERS = ("DDIMScheduler", "EulerDiscreteScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler")
MEGABYTE = 2**20
LEAK_MB = 24.0
"""Memory that the denoiser's allocator may add between rounds; leaked tensors of jobs would add more."""


@dataclass
class Arrival:
    """A request of the test, and its outcome."""

    arguments: dict[str, Any]
    at: float
    leaves_after: int | None
    """Number of progress events after which the caller cancels."""
    seconds: float = 0.0
    result: Result | None = None
    events: list[Progress] = field(default_factory=list)

    def run(self, served: Served) -> None:
        began = time.monotonic()
        stream: Iterator[Progress | Result] = served.client.stream(model="sd15", **self.arguments)
        for event in stream:
            if isinstance(event, Result):
                self.result = event
            else:
                self.events.append(event)
                if self.leaves_after is not None and len(self.events) >= self.leaves_after:
                    stream.close()  # type: ignore[attr-defined]
                    break
        self.seconds = time.monotonic() - began


def arrivals(seed: int) -> list[Arrival]:
    """Draw Poisson arrivals with mixed steps, some of them canceled."""
    chance = random.Random(seed)
    photos = images.photos(4, seed=60)
    leaving = set(chance.sample(range(REQUESTS), round(REQUESTS * CANCELLED_SHARE)))
    made, at = [], 0.0
    for index in range(REQUESTS):
        at += chance.expovariate(RATE_PER_S)
        adapter = chance.choice(["plain", "plus"])
        arguments = {
            "prompt": chance.choice(["a cat", "a dog", "a house by the sea"]),
            "ip_adapter_image": {adapter: chance.choice(photos)},
            "num_inference_steps": chance.randint(2, 8),
            "scheduler": chance.choice(SCHEDULERS),
            "height": 64,
            "width": chance.choice([64, 64, 96]),
            "seed": index,
        }
        made.append(Arrival(arguments, at, 1 if index in leaving else None))
    return made


def play(served: Served, requests: list[Arrival]) -> None:
    began = time.monotonic()
    threads = []
    for request in requests:
        time.sleep(max(began + request.at - time.monotonic(), 0.0))
        threads.append(threading.Thread(target=request.run, args=(served,)))
        threads[-1].start()
    for thread in threads:
        thread.join(60)


def denoiser_megabytes(served: Served) -> float:
    pid = next(pid for name, pid in served.server.stub_pids.items() if name.startswith("sd15_denoiser"))
    return psutil.Process(pid).memory_info().rss / MEGABYTE


def jobs(served: Served) -> dict[str, float]:
    metrics = served.metrics()
    gauges = ("imprompt_jobs{", "imprompt_rows{", "imprompt_requests_in_flight{")
    return {name: value for name, value in metrics.items() if name.startswith(gauges) and value}


def ended(served: Served) -> float:
    return sum(value for name, value in served.metrics().items() if name.startswith("imprompt_jobs_ended_total"))


@pytest.mark.timeout(300)
def test_thirty_arrivals(sd15: Served, record_property: Any) -> None:
    """Completed requests get the same picture as on their own; nothing is left behind."""
    play(sd15, arrivals(0))  # so that every size of memory block has been allocated once
    time.sleep(0.5)
    memory, count = denoiser_megabytes(sd15), ended(sd15)
    requests = arrivals(0)
    play(sd15, requests)

    staying = [request for request in requests if request.leaves_after is None]
    assert len(staying) == REQUESTS - round(REQUESTS * CANCELLED_SHARE)
    for request in staying:
        assert request.result is not None, request.arguments
        alone = sd15.generate(**request.arguments)
        largest, _ = picture_distance(np.asarray(request.result.images[0]), np.asarray(alone.images[0]))
        assert largest <= 1, f"{request.arguments}: {largest} levels"
    leaving = [request for request in requests if request.leaves_after is not None]
    assert all(request.result is None for request in leaving)

    deadline = time.monotonic() + 5.0
    while jobs(sd15) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not jobs(sd15), "jobs remain"
    assert ended(sd15) - count == REQUESTS + len(staying), "a job ended twice, or never"
    growth = denoiser_megabytes(sd15) - memory
    assert growth < LEAK_MB, f"the memory of the denoiser grew by {growth:.0f} MB"

    seconds = [request.seconds for request in staying]
    p50, p99 = np.percentile(seconds, [50, 99])
    record_property("p50_s", round(float(p50), 3))
    record_property("p99_s", round(float(p99), 3))
    print(f"\n{len(staying)} requests: p50 {p50:.3f} s, p99 {p99:.3f} s; memory {growth:+.1f} MB of {memory:.0f} MB")
    assert p99 < 30
