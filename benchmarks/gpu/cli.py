"""The command line: `python benchmarks/gpu --help`."""

from __future__ import annotations

import argparse
import shlex
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from gpu import driver, worker
from gpu.plan import STAGES, Options
from imprompt_bench.presets import PRESETS
from imprompt_serving.backends import get_backend

BUDGET_S = 480.0


def main(arguments: Sequence[str]) -> int:
    """Run all tasks, or in a child process a single one; return the exit status."""
    parser = argparse.ArgumentParser(prog="python benchmarks/gpu", description=__doc__)
    parser.add_argument("--preset", action="append", choices=PRESETS, help="may be repeated (default: sd15, sdxl)")
    parser.add_argument("--stage", action="append", choices=STAGES, help="may be repeated (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--precision", action="append", help="may be repeated (default: fp16 and fp8 on a GPU, fp32 on a CPU)"
    )
    parser.add_argument("--steps", type=int, default=20, help="denoising steps of a picture")
    parser.add_argument("--repeats", type=int, default=30, help="calls that are timed; a tenth as many pictures")
    parser.add_argument(
        "--budget-s", type=float, default=BUDGET_S, help="stages that have not begun by then are skipped"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("results"), help="folder for STAGE-PRESET.json")
    parser.add_argument("--work", type=Path, help="folder for engines and logs (default: a temporary one)")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.task:
        return worker.run(chosen.task, Options.load(chosen.work))
    offered = get_backend("inductor").precisions
    usual = ("fp16", "fp8") if chosen.device == "cuda" else ("fp32",)
    for precision in chosen.precision or ():
        if precision not in offered:
            parser.error(f"--precision: backend inductor offers {', '.join(offered)}")
    with tempfile.TemporaryDirectory(prefix="imprompt-gpu-") as scratch:
        return driver.run(
            Options(
                presets=tuple(dict.fromkeys(chosen.preset or ("sd15", "sdxl"))),
                stages=tuple(stage for stage in STAGES if stage in (chosen.stage or STAGES)),
                device=chosen.device,
                precisions=tuple(chosen.precision or (each for each in usual if each in offered)),
                steps=chosen.steps,
                repeats=chosen.repeats,
                budget_s=chosen.budget_s,
                began=time.time(),
                output=str(chosen.output.resolve()),
                work=str((chosen.work or Path(scratch)).resolve()),
                command=shlex.join(["python", "benchmarks/gpu", *arguments]),
            )
        )
