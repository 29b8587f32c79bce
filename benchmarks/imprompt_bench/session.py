"""One run: scenarios in their order, those that need others' numbers after them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from rich.console import Console

from imprompt import Client
from imprompt_bench.results import BenchError, Measurement, Run
from imprompt_bench.scenarios import Scenes, capacity
from imprompt_bench.stats import PERCENTILES, percentile
from imprompt_bench.subject import Subject
from imprompt_bench.systems import System, served
from imprompt_bench.workload import Workload

SCENARIOS = ("latency", "closed", "open", "overload", "mixed", "growth")
_UNDER_LOAD = {"open", "overload", "mixed"}


@dataclass(kw_only=True)
class Session:
    """Measures ``subject`` with ``requests`` samples a point, and tells of each point as it is there."""

    subject: Subject
    workload: Workload
    requests: int
    environment: dict[str, Any]
    console: Console
    measurements: list[Measurement] = field(default_factory=list)
    parity: dict[str, list[float]] = field(default_factory=dict)
    arithmetic: dict[str, float] = field(default_factory=dict)

    def run(self, scenarios: Sequence[str], baselines: Sequence[str], callers: Sequence[int]) -> None:
        """Everything that was asked for; loads other than one caller's are shares of what `closed` finds.

        Raises:
            BenchError: a baseline makes another picture, or a scenario got none.
        """
        self.arithmetic = self._arithmetic()
        scenes = Scenes(subject=self.subject, workload=self.workload, requests=self.requests)
        if "latency" in scenarios:
            self._latency(scenes, baselines)
        if _UNDER_LOAD & set(scenarios) or "closed" in scenarios:
            self._under_load(scenes, scenarios, callers)
        if "growth" in scenarios:
            self._keep(scenes.growth())

    def results(self, command: str) -> Run:
        """All that was measured until now."""
        return Run(
            command=command,
            environment=self.environment,
            bundle={
                "name": self.subject.model,
                "backend": self.subject.capabilities["backend"],
                "precision": self.subject.capabilities["precision"],
                "size": self.workload.size,
                "steps": self.workload.steps,
            },
            setup=self.subject.setup,
            arithmetic=self.arithmetic,
            parity=self.parity,
            measurements=self.measurements,
        )

    def _arithmetic(self) -> dict[str, float]:
        if self.subject.folder is None:
            return {}
        from imprompt_bench.arithmetic import gemm_flops, unet_flop

        unet = self.subject.folder / "base" / "unet"
        return {"unet_flop": unet_flop(unet, self.workload.size), "gemm_flops": gemm_flops()}

    def _latency(self, scenes: Scenes, baselines: Sequence[str]) -> None:
        with ExitStack() as stack:
            systems: dict[str, System] = {"imprompt": served(stack.enter_context(Client(self.subject.url)))}
            for name in baselines:
                if self.subject.folder is None:
                    raise BenchError("baselines need the checkpoints: measure a preset")
                from imprompt_bench.baselines import check_memory, load_baseline

                try:
                    check_memory(name, self.subject.setup["parameters"], self.workload.size)
                except BenchError as error:  # the others can be measured all the same
                    self.console.print(f"left out: {error}", soft_wrap=True)
                    continue
                systems[name] = load_baseline(name, self.subject.folder, self.subject.model, self.workload)
            exact = self.subject.capabilities["precision"] == "fp32"
            measured, self.parity = scenes.latency(systems, exact=exact)
        self._keep(measured)

    def _under_load(self, scenes: Scenes, scenarios: Sequence[str], callers: Sequence[int]) -> None:
        closed = self._keep(scenes.closed(sorted({1, *callers})))
        rate, alone = capacity(closed), median(closed[0].latencies())
        if "open" in scenarios:
            self._keep(scenes.open(rate))
        if "overload" in scenarios:
            self._keep(scenes.overload(rate, alone))
        if "mixed" in scenarios:
            self._keep(scenes.mixed(rate, alone))

    def _keep(self, measurements: Iterable[Measurement]) -> list[Measurement]:
        kept = []
        for measurement in measurements:
            kept.append(measurement)
            self.measurements.append(measurement)  # each as it is there: the next may fail
            self.console.print(_line(measurement), soft_wrap=True)
        return kept


def _line(measurement: Measurement) -> str:
    parts = [f"p{q} {percentile(measurement.latencies(), q).value:.3f} s" for q in PERCENTILES]
    if measurement.scenario != "latency":  # its systems take turns
        parts.append(f"{measurement.pictures_per_second:.2f} pictures/s")
    name = f"{measurement.scenario} {measurement.label}"
    value = "" if measurement.value is None else f" {measurement.value:g}"
    return f"{name}{value}: {', '.join(parts)}{'' if measurement.stable else ' (not stable)'}"
