"""Measure the ways of routing on real servers behind a real Envoy: `imprompt bench routing`."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

from imprompt_bench import load
from imprompt_bench.fleet.envoy import Envoy
from imprompt_bench.fleet.members import RowsWatcher, serve_members
from imprompt_bench.fleet.routings import ROWS_HEADER, routings
from imprompt_bench.fleet.traffic import MIX, Kind, draw
from imprompt_bench.presets import PRESETS
from imprompt_bench.results import Measurement, Run, Sample, environment
from imprompt_bench.stats import STABLE_WITHIN, spread
from imprompt_bench.target import exported_preset
from imprompt_bench.workload import Workload

PRESET, STEPS = "tiny", 8
MEMBERS, CALLERS = 3, 16
ROUNDS = 3
"""The ways take turns, so that a machine that becomes slower is slower for all of them."""
WARM_UP = 2 * CALLERS
"""Requests through each way before the first round, so that every kind has allocated its memory."""
_HEALTH_PORT = 1
"""Stands in for the health port of members, whose health is not checked here."""


def measure(requests: int, work: Path | None, command: str, say: Callable[[str], None]) -> Run:
    """Send `requests` requests from `CALLERS` callers through each way of routing, in each of `ROUNDS` rounds."""
    before = environment() | {"envoy": _envoy_version()}
    workload = Workload(model=PRESET, adapter="plain", size=PRESETS[PRESET].size, steps=STEPS, smallest=32)
    with ExitStack() as stack:
        folder, setup = stack.enter_context(exported_preset(PRESET, backend="onnxruntime", precision="fp32", work=work))
        members = stack.enter_context(serve_members(folder / "repository", MEMBERS))
        watcher = stack.enter_context(
            RowsWatcher([(member.grpc_address, member.metrics_address) for member in members])
        )
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="imprompt-envoy-")))
        addresses = [member.grpc_address for member in members]
        envoys = {
            name: stack.enter_context(Envoy([f"{address}:{_HEALTH_PORT}" for address in addresses], scratch, change))
            for name, change in routings(addresses, watcher.port).items()
        }
        measurements = compare(envoys, watcher, workload, requests, say=say)
        return Run(
            command=command,
            environment=before,
            bundle={
                "name": PRESET,
                "backend": "onnxruntime",
                "precision": "fp32",
                "size": workload.size,
                "steps": STEPS,
                "members": MEMBERS,
                "callers": CALLERS,
            },
            setup=setup,
            arithmetic={},
            parity={},
            measurements=measurements,
        )


def compare(
    envoys: Mapping[str, Envoy],
    watcher: RowsWatcher,
    workload: Workload,
    requests: int,
    *,
    mix: tuple[Kind, ...] = MIX,
    rounds: int = ROUNDS,
    say: Callable[[str], None] = lambda message: None,
) -> list[Measurement]:
    """Send requests of the same kinds through each of `envoys` in turn, in each round."""
    # Prompts and pictures differ, because members cache their embeddings.
    first = count(0, max(requests, WARM_UP))
    samples: dict[str, list[Sample]] = {name: [] for name in envoys}
    rows: dict[str, list[np.ndarray]] = {name: [] for name in envoys}
    seconds = dict.fromkeys(envoys, 0.0)
    for number in range(rounds + 1):
        kinds = list(islice(draw(number, mix), requests if number else WARM_UP))
        for name, envoy in envoys.items():
            plan = partial(_request, workload, kinds, next(first))
            traffic = partial(load.closed_loop, count=len(kinds), callers=CALLERS)
            with watcher.record() as series:
                own = load.run(envoy.address, plan, traffic)
            if number:
                samples[name] += own
                rows[name] += series
                seconds[name] += max(sample.ended for sample in own)
        say(f"round {number} of {rounds}" if number else "warmed up")
    return [_measurement(name, samples[name], seconds[name], rows[name]) for name in envoys]


def _request(workload: Workload, kinds: list[Kind], first: int, index: int) -> load.PlannedRequest:
    kind = kinds[index]
    changes: dict[str, Any] = {"num_images_per_prompt": kind.pictures}
    if kind.scale != 1.0:
        changes |= {"height": round(kind.scale * workload.size), "width": round(kind.scale * workload.size)}
    if kind.frames > 1:
        changes = {"num_frames": kind.frames}
    arguments = workload.request(first + index, **changes)
    return load.PlannedRequest(arguments=arguments, kind=kind.name, metadata=((ROWS_HEADER, str(kind.rows)),))


def _measurement(name: str, samples: list[Sample], seconds: float, rows: list[np.ndarray]) -> Measurement:
    differ = spread([sample.latency for sample in samples if sample.status == "ok"])
    outstanding = np.array(rows)
    busy = outstanding[outstanding.sum(axis=1) > 0]
    return Measurement(
        scenario="routing",
        label=name,
        seconds=seconds,
        stable=differ is not None and differ <= STABLE_WITHIN,
        spread=differ,
        notes={
            "busiest": float(busy.max(axis=1).sum() / busy.mean(axis=1).sum()),
            "idle": float((busy == 0).mean()),
        },
        samples=samples,
    )


def _envoy_version() -> str:
    envoy = Path(sys.executable).with_name("envoy")
    printed = subprocess.run([str(envoy), "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"/(\d+\.\d+\.\d+)/", printed)
    return found[1] if found else printed.strip()
