"""Run every task in a separate process, and record an outcome for each of its stages even if the process dies."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gpu.locks import compiling
from gpu.plan import COMPILE_SHARE, Options, Task, tasks
from gpu.record import Record, machine

POLL_S = 0.2
PROGRAM = (sys.executable, str(Path(__file__).parent))
GRACE_S = 60.0
"""How long after the budget a stage that has begun may go on."""
_REASON_CHARACTERS = 600


@dataclass(kw_only=True)
class Child:
    """The process of a task, and the marker files that show its progress."""

    task: Task
    options: Options
    process: subprocess.Popen[bytes] | None = None
    killed: str = ""
    """Why the driver killed it."""
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.log = Path(self.options.work, f"{self.task.name}.log")

    def start(self) -> None:
        environment = dict(os.environ)
        if self.options.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
            # Threads of several processes on few cores spend most of their time waiting for each other.
            environment.setdefault("OMP_NUM_THREADS", "1")
        command = [*PROGRAM, "--task", self.task.name, "--work", self.options.work]
        with self.log.open("ab") as log:
            # A session of its own: ending it ends the compilers that it started.
            self.process = subprocess.Popen(command, stderr=log, env=environment, start_new_session=True)

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def ready(self) -> bool:
        return marker(self.options, self.task, "ready").exists()

    def kill(self, reason: str) -> None:
        if self.process is not None and self.running:
            self.killed = reason
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def missing(self) -> list[str]:
        """Return the stages that have not started."""
        return [stage for stage in self.task.stages if not marker(self.options, self.task, stage).exists()]

    def unfinished(self) -> list[str]:
        """Return the stages without a recorded outcome."""
        return [stage for stage in self.task.stages if not marker(self.options, self.task, f"{stage}.done").exists()]

    def reason(self) -> str:
        """Return why it ended before all stages were measured."""
        if self.killed:
            return self.killed
        status = None if self.process is None else self.process.returncode
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        return f"the process ended with {status}: {' '.join(lines[-3:])[-_REASON_CHARACTERS:]}"


def marker(options: Options, task: Task, what: str) -> Path:
    """Return the file that marks `task` as ready, or one of its stages as started or done."""
    return Path(options.work, f"{task.name}.{what}")


def run(options: Options) -> int:
    """Run all tasks; return 0 if there is at least one measurement."""
    work, record = Path(options.work), Record(options)
    work.mkdir(parents=True, exist_ok=True)
    for stale in work.glob("*.*"):  # of an earlier run; engines are in folders
        if stale.is_file():
            stale.unlink()
    options.save()
    found = tasks(options)
    described = machine(options.device)
    files = dict.fromkeys((stage, task.preset) for task in found for stage in task.stages)
    for stage, preset in files:
        record.start(stage, preset, described)
    children = [Child(task=task, options=options) for task in found]
    if threading.current_thread() is threading.main_thread():
        signal.signal(
            signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
        )  # through `finally`, which ends children
    try:
        with compiling(work):
            for child in children:
                child.start()
            _wait_until_ready(children, options)
        _wait_until_done(children, options, record)
    finally:
        for child in children:
            child.kill("the run was ended")
            _account(child, record)
    measured = sum(len(record.measured(stage, preset)) for stage, preset in files)
    print(f"{measured} measurements in {options.elapsed_s:.0f} s: {options.output}", flush=True)
    return 0 if measured else 1


def _wait_until_ready(children: Sequence[Child], options: Options) -> None:
    """Wait until no task is compiling."""
    limit = COMPILE_SHARE * options.budget_s
    while waiting := [child for child in children if child.running and not child.ready]:
        _mark_over(children, options)
        if options.elapsed_s > limit:
            for child in waiting:
                child.kill(f"was not ready after {limit:.0f} s, {COMPILE_SHARE:.0%} of the budget")
        time.sleep(POLL_S)
    _mark_over(children, options)


def _wait_until_done(children: Sequence[Child], options: Options, record: Record) -> None:
    while any(child.running for child in children):
        if options.elapsed_s > options.budget_s + GRACE_S:
            return
        for child in children:
            if not child.running and child.ready and not child.killed and child.unfinished() and child.missing():
                _account(child, record)  # the stage that ended the process
                if options.elapsed_s < options.budget_s:
                    child.start()  # its engines are cached
        time.sleep(POLL_S)


def _mark_over(children: Sequence[Child], options: Options) -> None:
    """Mark tasks whose processes have ended, for the tasks that wait for them."""
    for child in children:
        if not child.running:
            marker(options, child.task, "over").touch()


def _account(child: Child, record: Record) -> None:
    """Say why a task did not finish stages: those that it has begun if it is to be started again, or else all."""
    begun = [stage for stage in child.unfinished() if stage not in child.missing()]
    ended = child.options.elapsed_s >= child.options.budget_s or child.killed or not child.ready
    for stage in child.unfinished() if ended or not begun else begun:
        record.skip(stage, child.task.preset, child.task.name, child.reason())
        marker(child.options, child.task, f"{stage}.done").touch()
        marker(child.options, child.task, stage).touch()
