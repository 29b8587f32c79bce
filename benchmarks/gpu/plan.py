"""What is measured: stages, the tasks that run them, and the options that all processes share."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

STAGES = ("parity", "unet", "picture", "denoiser", "served")
ROWS = {"tiny": (2, 8), "small": (2, 8), "sd15": (2, 8, 16), "sdxl": (2, 8)}
"""Rows of the UNet calls that are timed; a guided picture has two. The last is `shapes.rows` of the engines."""
COMPILE_SHARE = 0.7
"""Share of the budget after which a task that is still compiling is ended, so that the others can be measured."""
TRAINED = "trained"
"""The name of the embedded bundle in files, in place of a preset."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The options of a run. Processes read them from `work`."""

    presets: tuple[str, ...]
    stages: tuple[str, ...]
    device: str
    precisions: tuple[str, ...]
    """Precisions of the engines. Pictures, denoiser, and server are measured with the first one."""
    steps: int
    repeats: int
    budget_s: float
    began: float
    """Unix time."""
    output: str
    work: str
    command: str

    def save(self) -> None:
        Path(self.work, "options.json").write_bytes(msgspec.json.encode(self))

    @classmethod
    def load(cls, work: Path) -> Options:
        return msgspec.json.decode((work / "options.json").read_bytes(), type=cls)

    @property
    def elapsed_s(self) -> float:
        return time.time() - self.began

    @property
    def baseline_precision(self) -> str:
        """The precision of the baselines: that of the engines, or fp16 if they are quantized."""
        return self.precisions[0] if self.precisions[0] in ("fp32", "fp16", "bf16") else "fp16"


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One system in its own process. It prepares in parallel with others, then runs its stages alone on the device."""

    name: str
    system: str
    """A key of `worker.SYSTEMS`."""
    preset: str
    stages: tuple[str, ...]
    precision: str = ""
    rows: tuple[int, ...] = ()
    """Rows of the UNet calls that it times."""


def tasks(options: Options) -> list[Task]:
    """Return the tasks of a run with the requested stages."""
    found: list[Task] = []
    for preset in options.presets:
        rows = ROWS[preset]
        for index, precision in enumerate(options.precisions):
            stages = ("parity", "unet", "picture", "denoiser")[: 2 if index else 4]
            name = engines_task(preset, precision)
            found.append(
                Task(name=name, system="inductor", preset=preset, stages=stages, precision=precision, rows=rows)
            )
        both = ("unet", "picture")
        # One process for each number of rows: torch.compile works on one graph at a time.
        for count in rows if options.device == "cuda" else rows[:1]:
            name = f"{preset}-compiled-{count}"
            stages = both if count == rows[0] else ("unet",)
            found.append(Task(name=name, system="compiled", preset=preset, stages=stages, rows=(count,)))
        found.append(Task(name=f"{preset}-eager", system="eager", preset=preset, stages=both, rows=rows))
        found.append(
            Task(name=f"{preset}-onnxruntime", system="onnxruntime", preset=preset, stages=("unet",), rows=rows)
        )
    for precision in options.precisions:
        found.append(
            Task(
                name=f"{TRAINED}-{precision}",
                system=TRAINED,
                preset=TRAINED,
                stages=("parity",),
                precision=precision,
            )
        )
    found.append(Task(name="served", system="served", preset=options.presets[0], stages=("served",)))
    wanted = [
        msgspec.structs.replace(task, stages=tuple(stage for stage in task.stages if stage in options.stages))
        for task in found
    ]
    return [task for task in wanted if task.stages]


def engines_task(preset: str, precision: str) -> str:
    return f"{preset}-inductor-{precision}"
