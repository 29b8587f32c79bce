"""The scenarios. Each returns its measurements, including the raw samples."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import numpy as np

from imprompt import Client
from imprompt_bench import load
from imprompt_bench.results import BenchError, Measurement, Sample, ServerUse
from imprompt_bench.stats import STABLE_WITHIN, poisson_arrivals, spread
from imprompt_bench.systems import Arguments, System, check_same_picture
from imprompt_bench.target import Target
from imprompt_bench.workload import Workload

NUMBERS = 10_000
"""Upper limit for the requests of a measurement, so that request numbers never overlap."""
LOADS = (0.3, 0.6, 0.9)
"""Arrival rates of `open`, as fractions of the measured capacity."""
OVERLOAD, RECOVERY = 3.0, 0.5
"""Arrival rates of `overload`, during it and after it, as fractions of the measured capacity."""
MIXED_LOAD = 0.6
"""Arrival rate of `mixed`, as a fraction of the measured capacity."""
RANDOM_WITHIN = 0.5
"""Like `STABLE_WITHIN`, for random arrivals: windows differ more, but not by as much as if a queue kept growing."""
RECOVERED_WITHIN = 2.0
"""The server has recovered when a request takes at most this many times the median latency of a single caller."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScenarioRunner:
    """Runs scenarios on a server, with `requests` samples per measurement."""

    target: Target
    workload: Workload
    requests: int
    _first_numbers: Iterator[int] = field(default_factory=lambda: count(0, NUMBERS))
    """First request number of each measurement; distinct numbers keep the server's cache from answering requests."""

    def latency(
        self, systems: Mapping[str, System], *, exact: bool
    ) -> tuple[list[Measurement], dict[str, list[float]]]:
        """Send one request at a time to each system in turn, after checking that all produce the same picture."""
        number = next(self._first_numbers)
        first = {name: system(self.workload.request(number)) for name, system in systems.items()}
        parity = {
            name: check_same_picture(name, answer, first["imprompt"], exact=exact or name == "bare")
            for name, answer in first.items()
            if name != "imprompt"
        }
        samples: dict[str, list[Sample]] = {name: [] for name in systems}
        began = time.perf_counter()
        names = list(systems)
        for index in range(1, self.requests + 1):
            # Rotate the order: a system that runs after a busy one may find a warmer machine.
            for name in names[index % len(names) :] + names[: index % len(names)]:
                samples[name].append(_timed(systems[name], self.workload.request(number + index), index, began))
        return [_measurement("latency", name, own, None) for name, own in samples.items()], parity

    def closed(self, callers: Sequence[int]) -> Iterator[Measurement]:
        """Run several numbers of callers, each with one request at a time."""
        for number in callers:
            traffic = partial(load.closed_loop, count=self.requests, callers=number)
            yield self._run("closed", "imprompt", traffic, value=number)

    def open(self, capacity: float, loads: Sequence[float] = LOADS) -> Iterator[Measurement]:
        """Send requests at random times, at fractions of `capacity` (pictures per second)."""
        for share in loads:
            arrivals = poisson_arrivals(share * capacity, self.requests)
            traffic = partial(load.open_loop, arrivals=arrivals)
            yield self._run("open", "imprompt", traffic, value=share, within=RANDOM_WITHIN)

    def overload(self, capacity: float, undisturbed: float) -> list[Measurement]:
        """Send more requests than the server can handle, then fewer; `undisturbed` is the latency of one caller."""
        more = poisson_arrivals(OVERLOAD * capacity, 6 * self.requests)
        less = poisson_arrivals(RECOVERY * capacity, 2 * self.requests, seed=1)
        arrivals = more + [more[-1] + at for at in less]
        whole = self._run("overload", "imprompt", partial(load.open_loop, arrivals=arrivals), within=RANDOM_WITHIN)
        phases = {"during": whole.samples[: len(more)], "after": whole.samples[len(more) :]}
        seconds = recovery(phases["after"], more[-1], RECOVERED_WITHIN * undisturbed)
        notes = {} if seconds is None else {"recovery_s": seconds}
        return [
            _measurement(
                "overload", name, own, whole.server, within=RANDOM_WITHIN, notes=notes if name == "after" else {}
            )
            for name, own in phases.items()
        ]

    def mixed(self, capacity: float, undisturbed: float) -> list[Measurement]:
        """Mix sizes, steps, requests with and without image prompts, repeated pictures, and cancellations."""
        arrivals = poisson_arrivals(MIXED_LOAD * capacity, 2 * self.requests)
        plan = partial(self.workload.mixed, seconds=undisturbed)
        traffic = partial(load.open_loop, arrivals=arrivals)
        return [self._run("mixed", "imprompt", traffic, plan=plan, within=RANDOM_WITHIN)]

    def growth(self) -> Iterator[Measurement]:
        """Send one request at a time, varying one parameter: steps, size, image prompts, pictures or frames."""
        with Client(self.target.url) as client:

            def system(arguments: Arguments) -> dict[str, float]:
                return client.generate(**arguments).timings

            for label, value, changes in self._grown():
                number, samples = next(self._first_numbers), list[Sample]()
                system(self.workload.request(number, **changes))  # warm-up: allocates memory for this size
                began = time.perf_counter()
                for index in range(1, max(self.requests // 4, 3) + 1):
                    request = self.workload.request(number + index, **changes)
                    samples.append(_timed(system, request, index, began))
                yield _measurement("growth", label, samples, None, value=value)

    def _grown(self) -> Iterator[tuple[str, int, dict[str, Any]]]:
        """Yield the parameter to vary, its value, and the request arguments for it."""
        work, limits = self.workload, self.target.capabilities["limits"]
        for factor in (1, 2, 4):
            yield "steps", factor * work.steps, {"num_inference_steps": factor * work.steps}
        for half in (1, 2, 3):
            size = half * work.size // 16 * 8
            if limits["height"][0] <= size <= limits["height"][1]:
                yield "size", size, {"height": size, "width": size}
        for number in (0, 1, 2, 4) if work.adapter else ():
            yield "image prompts", number, {"references": number}
        for number in (1, 2, 4):
            yield "pictures", number, {"num_images_per_prompt": number}
        lowest, highest = limits.get("frames", (0, 0))
        for frames in (4, 8, 16):
            if lowest <= frames <= highest:
                yield "frames", frames, {"num_frames": frames}

    def _run(
        self,
        scenario: str,
        label: str,
        traffic: Callable[[load.Ask], Awaitable[list[Sample]]],
        *,
        value: float | None = None,
        plan: Callable[[int], load.PlannedRequest] | None = None,
        within: float = STABLE_WITHIN,
    ) -> Measurement:
        number, planned = next(self._first_numbers), plan or self.workload.plain
        with self.target.observer.watch() as use:
            samples = load.run(self.target.url, lambda index: planned(number + index), traffic)
            server = use()
        return _measurement(scenario, label, samples, server, value=value, within=within)


def capacity(closed: Sequence[Measurement]) -> float:
    """Return the most pictures per second reached with any number of callers."""
    return max(measurement.pictures_per_second for measurement in closed)


def recovery(samples: Sequence[Sample], since: float, latency: float) -> float | None:
    """Return the seconds from `since` to the first request that took at most `latency`; None if there is none."""
    served = [sample.intended - since for sample in samples if sample.status == "ok" and sample.latency <= latency]
    return min(served, default=None)


def _timed(system: Callable[[Arguments], Any], arguments: Arguments, index: int, began: float) -> Sample:
    sent = time.perf_counter() - began
    answer = system(arguments)
    ended = time.perf_counter() - began
    timings = answer if isinstance(answer, dict) else answer.timings
    pictures = arguments.get("num_images_per_prompt", 1)
    return Sample(index=index, intended=sent, sent=sent, ended=ended, pictures=pictures, timings=timings)


def _measurement(
    scenario: str,
    label: str,
    samples: list[Sample],
    server: ServerUse | None,
    *,
    value: float | None = None,
    within: float = STABLE_WITHIN,
    notes: dict[str, float] | None = None,
) -> Measurement:
    answered = sorted((sample for sample in samples if sample.status == "ok"), key=lambda sample: sample.ended)
    if not answered:
        found = sorted({sample.status for sample in samples})
        raise BenchError(f"{scenario}: none of {len(samples)} requests succeeded: {', '.join(found)}")
    differ = spread([sample.latency for sample in answered])
    return Measurement(
        scenario=scenario,
        label=label,
        value=value,
        seconds=float(np.ptp([time for sample in samples for time in (sample.sent, sample.ended)])),
        stable=differ is not None and differ <= within,
        spread=differ,
        server=server,
        notes=notes or {},
        samples=samples,
    )
