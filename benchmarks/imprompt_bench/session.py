"""Run scenarios in an order in which each has the numbers it needs from earlier ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from rich.console import Console

from imprompt import Client
from imprompt_bench.results import BenchError, Measurement, Run
from imprompt_bench.scenarios import ScenarioRunner, capacity
from imprompt_bench.stats import PERCENTILES, percentile
from imprompt_bench.systems import System, served_system
from imprompt_bench.target import Target
from imprompt_bench.workload import Workload

SCENARIOS = ("latency", "closed", "open", "overload", "mixed", "growth")
_UNDER_LOAD = {"open", "overload", "mixed"}


@dataclass(kw_only=True)
class Session:
    """Measures `target` with `requests` samples per measurement, and reports each measurement when it is done."""

    target: Target
    workload: Workload
    requests: int
    environment: dict[str, Any]
    console: Console
    measurements: list[Measurement] = field(default_factory=list)
    parity: dict[str, list[float]] = field(default_factory=dict)
    arithmetic: dict[str, float] = field(default_factory=dict)

    def run(self, scenarios: Sequence[str], baselines: Sequence[str], callers: Sequence[int]) -> None:
        """Run the scenarios. Arrival rates are fractions of the capacity measured by `closed`.

        Raises:
            BenchError: a baseline produces a different picture, or all requests of a scenario failed.
        """
        self.arithmetic = self._arithmetic()
        runner = ScenarioRunner(target=self.target, workload=self.workload, requests=self.requests)
        if "latency" in scenarios:
            self._latency(runner, baselines)
        if _UNDER_LOAD & set(scenarios) or "closed" in scenarios:
            self._under_load(runner, scenarios, callers)
        if "growth" in scenarios:
            self._keep(runner.growth())

    def results(self, command: str) -> Run:
        """Collect all measurements so far."""
        return Run(
            command=command,
            environment=self.environment,
            bundle={
                "name": self.target.model,
                "backend": self.target.capabilities["backend"],
                "precision": self.target.capabilities["precision"],
                "size": self.workload.size,
                "steps": self.workload.steps,
            },
            setup=self.target.setup,
            arithmetic=self.arithmetic,
            parity=self.parity,
            measurements=self.measurements,
        )

    def _arithmetic(self) -> dict[str, float]:
        if self.target.folder is None:
            return {}
        from imprompt_bench.arithmetic import gemm_flops, unet_flop

        unet = self.target.folder / "base" / "unet"
        return {"unet_flop": unet_flop(unet, self.workload.size), "gemm_flops": gemm_flops()}

    def _latency(self, runner: ScenarioRunner, baselines: Sequence[str]) -> None:
        precision = self.target.capabilities["precision"]
        with ExitStack() as stack:
            systems: dict[str, System] = {"imprompt": served_system(stack.enter_context(Client(self.target.url)))}
            for name in baselines:
                if self.target.folder is None:
                    raise BenchError("baselines need checkpoints, so they can only be measured with a preset")
                from imprompt_bench.baselines import check_memory, load_baseline

                try:
                    check_memory(name, self.target.setup["parameters"], self.workload.size, precision)
                except BenchError as error:  # the other baselines can still be measured
                    self.console.print(f"skipped: {error}", soft_wrap=True)
                    continue
                systems[name] = load_baseline(name, self.target.folder, self.target.model, precision, self.workload)
            measured, self.parity = runner.latency(systems, exact=precision == "fp32")
        self._keep(measured)

    def _under_load(self, runner: ScenarioRunner, scenarios: Sequence[str], callers: Sequence[int]) -> None:
        closed = self._keep(runner.closed(sorted({1, *callers})))
        rate, alone = capacity(closed), median(closed[0].latencies())
        if "open" in scenarios:
            self._keep(runner.open(rate))
        if "overload" in scenarios:
            self._keep(runner.overload(rate, alone))
        if "mixed" in scenarios:
            self._keep(runner.mixed(rate, alone))

    def _keep(self, measurements: Iterable[Measurement]) -> list[Measurement]:
        kept = []
        for measurement in measurements:
            kept.append(measurement)
            self.measurements.append(measurement)  # immediately, because the next one may fail
            self.console.print(_line(measurement), soft_wrap=True)
        return kept


def _line(measurement: Measurement) -> str:
    parts = [f"p{q} {percentile(measurement.latencies(), q).value:.3f} s" for q in PERCENTILES]
    if measurement.scenario != "latency":  # there, systems take turns, so throughput means nothing
        parts.append(f"{measurement.pictures_per_second:.2f} pictures/s")
    name = f"{measurement.scenario} {measurement.label}"
    value = "" if measurement.value is None else f" {measurement.value:g}"
    return f"{name}{value}: {', '.join(parts)}{'' if measurement.stable else ' (not stable)'}"
