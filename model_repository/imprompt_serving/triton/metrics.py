"""Custom metrics of a Triton model, updated on a separate thread: each update is a message between processes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from queue import SimpleQueue
from typing import Any, NamedTuple

import triton_python_backend_utils as pb_utils

from imprompt_serving import metrics
from imprompt_serving.denoiser.meter import Meter, Population
from imprompt_serving.metrics import MetricSpec

logger = logging.getLogger(__name__)


class _Update(NamedTuple):
    name: str
    value: str | None
    method: str
    number: float


class Metrics:
    """The metrics of `specs` for one model, starting at zero. Updates return at once."""

    def __init__(self, specs: Iterable[MetricSpec], model: str) -> None:
        # Triton drops the metrics of a family when it is garbage-collected.
        self._families: list[Any] = []
        self._metrics: dict[tuple[str, str | None], Any] = {}
        for spec in specs:
            family = pb_utils.MetricFamily(
                name=spec.name, description=spec.doc, kind=getattr(pb_utils.MetricFamily, spec.kind)
            )
            self._families.append(family)
            arguments = {"buckets": list(spec.buckets)} if spec.buckets else {}
            for value in spec.values or (None,):
                labels = {"model": model} | ({str(spec.label): value} if value else {})
                self._metrics[spec.name, value] = family.Metric(labels=labels, **arguments)
        self._updates: SimpleQueue[_Update | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def of(self, spec: MetricSpec, value: str | None = None) -> Any:
        """Return Triton's metric object, for updates that must be synchronous."""
        return self._metrics[spec.name, value]

    def add(self, spec: MetricSpec, value: str | None = None, number: float = 1.0) -> None:
        self._updates.put(_Update(spec.name, value, "increment", number))

    def set(self, spec: MetricSpec, value: str | None, number: float) -> None:
        self._updates.put(_Update(spec.name, value, "set", number))

    def observe(self, spec: MetricSpec, value: str | None, number: float) -> None:
        self._updates.put(_Update(spec.name, value, "observe", number))

    def close(self) -> None:
        """Send pending updates and stop. Metrics must be released while Triton still listens."""
        self._updates.put(None)
        self._thread.join()
        self._metrics.clear()
        self._families.clear()

    def _run(self) -> None:
        while (update := self._updates.get()) is not None:
            try:
                getattr(self._metrics[update.name, update.value], update.method)(update.number)
            except Exception:
                logger.exception("failed to update metric %s", update.name)


class DenoiserMeter(Meter):
    """Reports the denoiser's loop as metrics."""

    def __init__(self, triton_metrics: Metrics) -> None:
        self._metrics = triton_metrics
        self._last: dict[tuple[MetricSpec, str], int] = {}

    def population(self, population: Population) -> None:
        for state in ("running", "waiting"):
            self._set(metrics.JOBS, state, getattr(population, f"{state}_jobs"))
            self._set(metrics.ROWS, state, getattr(population, f"{state}_rows"))

    def ticked(self, rows: int, seconds: float) -> None:
        self._metrics.observe(metrics.TICK_ROWS, None, rows)
        self._metrics.observe(metrics.TICK_SECONDS, None, seconds)

    def ended(self, outcome: str) -> None:
        self._metrics.add(metrics.JOBS_ENDED, outcome)

    def refused(self, reason: str) -> None:
        self._metrics.add(metrics.JOBS_REFUSED, reason)

    def _set(self, spec: MetricSpec, state: str, number: int) -> None:
        if self._last.get((spec, state)) != number:
            self._last[spec, state] = number
            self._metrics.set(spec, state, number)
