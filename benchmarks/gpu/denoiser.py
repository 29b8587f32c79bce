"""Stage `denoiser`: the loop of the server on the device, against the bare call of its UNet."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpu.plan import Options
from gpu.record import callers_measurement, measurement
from gpu.systems import Run, System
from gpu.timing import device_seconds, fewer, synchronize, torch_device
from imprompt_bench.results import Measurement
from imprompt_bench.rig import Rig
from imprompt_serving.denoiser.answers import Listener, Outcome
from imprompt_serving.denoiser.job import Job
from imprompt_serving.denoiser.meter import Meter
from imprompt_serving.errors import RequestError
from imprompt_serving.gpu import preparation_stream

CALLERS = (1, 4, 8)
LONG = 100
"""Steps of a job that is still running when something is done to it."""
AFTER_TICKS = 5
"""Ticks after which that is done."""
_TIMEOUT_S = 120.0


class Ticks(Meter):
    """Counts the ticks of a loop: those that have begun in `CountedEngine`, and those that are complete."""

    def __init__(self) -> None:
        self.begun = self.complete = self.most_in_flight = 0
        self.seconds: list[float] = []
        self._changed = threading.Condition()

    def begin(self) -> None:
        with self._changed:
            self.begun += 1
            self.most_in_flight = max(self.most_in_flight, self.begun - self.complete)

    def ticked(self, rows: int, seconds: float) -> None:
        with self._changed:
            self.complete += 1
            self.seconds.append(seconds)
            self._changed.notify_all()

    def wait_for(self, complete: int) -> None:
        """Wait until so many ticks are complete."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.complete >= complete, _TIMEOUT_S):
                raise TimeoutError(f"{complete} ticks were not complete after {_TIMEOUT_S:g} s")


class CountedEngine:
    """An engine whose calls begin ticks; a tick of this stage is one call."""

    def __init__(self, engine: Any, ticks: Ticks) -> None:
        self._engine, self._ticks = engine, ticks

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self._ticks.begin()
        answer: dict[str, np.ndarray] = self._engine.run(tensors)
        return answer

    def run_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self._ticks.begin()
        answer: dict[str, Tensor] = self._engine.run_tensors(tensors)
        return answer


class Loop:
    """A denoiser whose ticks are counted."""

    def __init__(self, system: System, options: Options) -> None:
        assert system.bundle is not None
        self.device, self.steps, self.ticks = options.device, options.steps, Ticks()
        self._size = system.bundle.default_height
        self._rig = Rig(
            system.bundle,
            CountedEngine(system.engine, self.ticks),
            self.ticks,
            bucketed=options.device == "cuda",
            device=torch_device(options.device),
        )
        self._numbers = itertools.count()

    def job(self, steps: int) -> Job:
        number = next(self._numbers)
        return self._rig.job(f"{number}", steps=steps, size=self._size, seed=number)

    def submit(self, job: Job, listener: Listener) -> None:
        self._rig.denoiser.submit(job, listener)

    def cancel(self, job: Job) -> None:
        self._rig.denoiser.cancel(job.id)

    def run(self, callers: int) -> float:
        """Seconds of `callers` pictures that begin together, until the last one has its latents on the host."""
        jobs = [self.job(self.steps) for _ in range(callers)]
        began = time.perf_counter()
        waits = [self._rig.submit(job) for job in jobs]
        for wait in waits:
            wait()
        return time.perf_counter() - began

    def stop(self) -> None:
        self._rig.denoiser.stop(_TIMEOUT_S)


def denoiser(system: System, options: Options) -> Iterator[Measurement]:
    """Pictures by callers, then a job that is canceled, one that joins, and ticks beside the VAE."""
    loop = Loop(system, options)
    try:
        for callers in [count for count in CALLERS if 2 * count in system.inputs]:
            yield _throughput(loop, system, options, callers)
        loop.run(2)  # the rows of two callers are new, too
        yield _cancel(loop, options)
        yield _join(loop, options)
        yield from _beside_the_vae(loop, system, options)
    finally:
        loop.stop()


def _throughput(loop: Loop, system: System, options: Options, callers: int) -> Measurement:
    rows = 2 * callers
    bare = median(device_seconds(partial(system.unet, system.inputs[rows]), options.device, options.repeats))
    loop.run(callers)  # the first time, each number of rows is prepared
    loop.ticks.most_in_flight, ticks = 0, loop.ticks.complete
    seconds = [loop.run(callers) for _ in range(fewer(options.repeats))]
    calls = (loop.ticks.complete - ticks) / len(seconds)
    return callers_measurement(
        "denoiser",
        callers,
        seconds,
        step=median(seconds) / options.steps,
        bare=bare,
        notes={"calls_per_step": calls / options.steps, "most_ticks_in_flight": loop.ticks.most_in_flight},
    )


def _cancel(loop: Loop, options: Options) -> Measurement:
    """From `cancel` until the caller has the answer, and until the device has nothing left to do."""
    answered, idle, ticks = [], [], []
    for _ in range(fewer(options.repeats)):
        job, outcome = loop.job(LONG), Outcome()
        loop.submit(job, outcome)
        loop.ticks.wait_for(loop.ticks.complete + AFTER_TICKS)
        complete, began = loop.ticks.complete, time.perf_counter()
        loop.cancel(job)
        _wait(outcome.ended)
        answered.append(time.perf_counter() - began)
        synchronize(loop.device)
        idle.append(time.perf_counter() - began)
        loop.ticks.wait_for(loop.ticks.begun)
        ticks.append(loop.ticks.begun - complete)
    notes = {"device_idle_ms": 1000 * median(idle), "most_ticks_after": max(ticks)}
    return measurement("denoiser", "cancel until answered", answered, notes=notes)


def _join(loop: Loop, options: Options) -> Measurement:
    """From `submit` of a job beside a running one until its first step is told."""
    seconds, started, ticks = [], [], []
    for _ in range(fewer(options.repeats)):
        running, outcome = loop.job(LONG), Outcome()
        loop.submit(running, outcome)
        loop.ticks.wait_for(loop.ticks.complete + AFTER_TICKS)
        job, joined = loop.job(1), Outcome()
        begun, now, began = loop.ticks.begun, time.monotonic(), time.perf_counter()
        loop.submit(job, joined)
        _wait(joined.ended)
        seconds.append(time.perf_counter() - began)
        ticks.append(loop.ticks.complete - begun)
        started.append((job.started or now) - now)
        loop.cancel(running)
        _wait(outcome.ended)
        _raise(joined)
    notes = {"until_started_ms": 1000 * median(started), "most_ticks": max(ticks)}
    return measurement("denoiser", "join until the first step is told", seconds, notes=notes)


def _beside_the_vae(loop: Loop, system: System, options: Options) -> Iterator[Measurement]:
    """Seconds of a tick of one caller while nothing else runs, and while another thread decodes without a pause."""
    runs = fewer(options.repeats)
    yield _tick_percentiles("ticks alone", _tick_seconds(loop, runs))
    side = system.networks.size // 8
    latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0)).to(options.device)
    for precision, decode in system.decoders.items():
        with _Decoding(decode, latents) as decoding:
            seconds = _tick_seconds(loop, runs)
        yield _tick_percentiles(f"ticks while VAE {precision} decodes", seconds, pictures_decoded=decoding.pictures)


def _tick_seconds(loop: Loop, runs: int) -> list[float]:
    loop.ticks.wait_for(loop.ticks.begun)  # of canceled jobs
    first = len(loop.ticks.seconds)
    for _ in range(runs):
        loop.run(1)
    return loop.ticks.seconds[first:]


def _tick_percentiles(label: str, seconds: Sequence[float], **notes: float) -> Measurement:
    percentiles = {f"p{q}_ms": float(1000 * np.percentile(seconds, q)) for q in (50, 99)}
    return measurement("denoiser", label, seconds, value=1, notes=percentiles | notes)


class _Decoding:
    """Decodes the same latents again and again on another thread, on a stream of its own."""

    def __init__(self, decode: Run, latents: Tensor) -> None:
        self._decode, self._latents = decode, latents
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="decode", daemon=True)
        self._error: Exception | None = None
        self.pictures = 0

    def __enter__(self) -> _Decoding:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(_TIMEOUT_S)
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            with torch.inference_mode(), preparation_stream(self._latents.device):
                while not self._stop.is_set():
                    self._decode({"latents": self._latents}).cpu()  # waits for the device, as a server's answer does
                    self.pictures += 1
        except Exception as error:
            self._error = error


def _wait(ended: threading.Event) -> None:
    if not ended.wait(_TIMEOUT_S):
        raise TimeoutError(f"a job was not answered after {_TIMEOUT_S:g} s")


def _raise(outcome: Outcome) -> None:
    if isinstance(outcome.error, RequestError):
        raise outcome.error
