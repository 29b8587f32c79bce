"""The results of a run: a file for each stage and preset, complete after each measurement."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from gpu.locks import writing
from gpu.plan import Options
from imprompt_bench.results import Measurement, Run, Sample, environment
from imprompt_bench.stats import STABLE_WITHIN, spread


def measurement(
    stage: str,
    label: str,
    seconds: Sequence[float] = (),
    *,
    value: float | None = None,
    pictures: int = 1,
    notes: Mapping[str, float] | None = None,
) -> Measurement:
    """Describe a series of `seconds`, or only `notes` if nothing was timed.

    Raises:
        ValueError: a note is not a finite number, which JSON does not have.
    """
    if broken := [f"{name} {number}" for name, number in (notes or {}).items() if not math.isfinite(number)]:
        raise ValueError(f"{label}: {', '.join(broken)}")
    at, samples = 0.0, []
    for index, duration in enumerate(seconds):
        samples.append(Sample(index=index, intended=at, sent=at, ended=at + duration, pictures=pictures))
        at += duration
    found = spread(seconds)
    return Measurement(
        scenario=stage,
        label=label,
        value=value,
        seconds=at,
        stable=found is not None and found <= STABLE_WITHIN,
        spread=found,
        notes=dict(notes or {}),
        samples=samples,
    )


def callers_measurement(
    stage: str, callers: int, seconds: Sequence[float], *, step: float, bare: float, notes: Mapping[str, float] = {}
) -> Measurement:
    """Describe pictures that `callers` made at the same time, with their seconds a step next to a bare UNet call."""
    compared = {
        "pictures_per_s": callers / median(seconds),
        "step_ms": 1000 * step,
        "bare_call_ms": 1000 * bare,
        "step_over_bare": step / bare,
    }
    return measurement(stage, "callers", seconds, value=callers, pictures=callers, notes=compared | dict(notes))


class Record:
    """The files of a run. All of its processes add to them."""

    def __init__(self, options: Options) -> None:
        self._options = options

    def file(self, stage: str, preset: str) -> Path:
        return Path(self._options.output, f"{stage}-{preset}.json")

    def start(self, stage: str, preset: str, environment: dict[str, Any]) -> None:
        """Start a file, replacing that of an earlier run."""
        options = self._options
        precisions = ", ".join(options.precisions)
        Run(
            command=options.command,
            environment=environment,
            bundle={"name": preset, "backend": "inductor", "precision": precisions, "steps": options.steps},
            setup={},
            arithmetic={},
            parity={},
            measurements=[],
        ).save(self.file(stage, preset))

    def add(self, stage: str, preset: str, found: Measurement) -> None:
        def change(run: Run) -> Run:
            return msgspec.structs.replace(run, measurements=[*run.measurements, found])

        self._change(stage, preset, change)
        print(f"{stage} {preset}: {line(found)}", flush=True)

    def skip(self, stage: str, preset: str, what: str, reason: str) -> None:
        def change(run: Run) -> Run:
            return msgspec.structs.replace(run, skipped={**run.skipped, what: reason})

        self._change(stage, preset, change)
        print(f"{stage} {preset}: {what} skipped: {reason}", flush=True)

    def describe(self, stage: str, preset: str, *, setup: dict[str, Any], arithmetic: dict[str, float]) -> None:
        """Add what a process found out while it was prepared."""

        def change(run: Run) -> Run:
            return msgspec.structs.replace(
                run, setup={**run.setup, **setup}, arithmetic={**run.arithmetic, **arithmetic}
            )

        self._change(stage, preset, change)

    def measured(self, stage: str, preset: str) -> list[Measurement]:
        return Run.load(self.file(stage, preset)).measurements

    def _change(self, stage: str, preset: str, change: Callable[[Run], Run]) -> None:
        with writing(Path(self._options.work)):
            file = self.file(stage, preset)
            change(Run.load(file)).save(file)


def line(found: Measurement) -> str:
    """One line about a measurement, for people who wait for it."""
    value = "" if found.value is None else f" {found.value:g}"
    times = f": {1000 * median(found.latencies()):.3f} ms" if found.samples else ":"
    notes = ", ".join(f"{name} {number:.4g}" for name, number in found.notes.items())
    return f"{found.label}{value}{times}{' ' if notes else ''}{notes}"


def machine(device: str) -> dict[str, Any]:
    """The machine, its GPU only where it is used."""
    described = environment()
    return described if device != "cpu" else {k: v for k, v in described.items() if k not in ("gpu", "driver")}
