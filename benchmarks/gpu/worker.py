"""Run one task in its own process: prepare in parallel with other tasks, then run its stages alone on the device."""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from gpu.locks import alone, compiling
from gpu.plan import TRAINED, Options, Task, tasks
from gpu.record import Record
from imprompt_bench.results import Measurement

SYSTEMS = {
    "inductor": "gpu.systems:inductor",
    "eager": "gpu.systems:eager",
    "compiled": "gpu.systems:compiled",
    "onnxruntime": "gpu.systems:onnxruntime",
    TRAINED: "gpu.trained:prepare",
    "served": "gpu.served:prepare",
}
"""Functions that prepare the systems. Only the process of a task imports its system, whose packages may be missing."""
STAGES = {
    "parity": "gpu.calls:parity",
    "unet": "gpu.calls:unet",
    "picture": "gpu.picture:picture",
    "denoiser": "gpu.denoiser:denoiser",
    "served": "gpu.served:served",
}
_REASON_CHARACTERS = 600


def run(name: str, options: Options) -> int:
    """Run the task `name`. Record failures, and continue with the next stage."""
    (task,) = (task for task in tasks(options) if task.name == name)
    _be_quiet()
    record, marked = Record(options), Path(options.work)
    left = [stage for stage in task.stages if not (marked / f"{name}.{stage}").exists()]

    def skip(stage: str, reason: str) -> None:
        (marked / f"{name}.{stage}").touch()
        record.skip(stage, task.preset, name, reason)
        (marked / f"{name}.{stage}.done").touch()

    try:
        with compiling(Path(options.work)):
            system = _load(SYSTEMS[task.system])(task, options)
    except Exception as error:
        reason = _reason(error)
        for stage in left:
            skip(stage, reason)
        return 0
    (marked / f"{name}.ready").touch()
    for stage in left:
        with alone(Path(options.work)):
            if options.elapsed_s > options.budget_s:
                skip(stage, f"the budget of {options.budget_s:g} s was over")
                continue
            (marked / f"{name}.{stage}").touch()
            _describe(record, stage, task, system)
            run_stage = _load("gpu.trained:parity" if task.system == TRAINED else STAGES[stage])
            _run_stage(run_stage, stage, task, system, options, record)
            (marked / f"{name}.{stage}.done").touch()
    return 0


def _run_stage(
    run_stage: Callable[..., Iterator[Measurement]],
    stage: str,
    task: Task,
    system: Any,
    options: Options,
    record: Record,
) -> None:
    try:
        for found in run_stage(system, options):
            record.add(stage, task.preset, found)
    except Exception as error:
        record.skip(stage, task.preset, task.name, _reason(error))


def _describe(record: Record, stage: str, task: Task, system: Any) -> None:
    """Record what is known before timing: build times, and parts that could not be built."""
    setup = getattr(system, "setup", {})
    flop = {f"unet_flop_{rows}_rows": count for rows, count in getattr(system, "flop", {}).items()}
    record.describe(stage, task.preset, setup=setup, arithmetic=flop)
    for what, reason in getattr(system, "skipped", {}).items():
        record.skip(stage, task.preset, f"{task.name}: {what}", reason)


def _load(path: str) -> Callable[..., Any]:
    module, name = path.split(":")
    found: Callable[..., Any] = getattr(import_module(module), name)
    return found


def _reason(error: Exception) -> str:
    """Summarize `error` in one line, and write its traceback to the log of the task."""
    traceback.print_exception(error)
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:_REASON_CHARACTERS]}"


def _be_quiet() -> None:
    """Silence warnings that libraries address to their developers."""
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
