"""The benchmark for GPUs runs, with small networks on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu/bench.py"


@pytest.mark.timeout(900)
def test_the_script(tmp_path: Path) -> None:
    engines = ("diffusers", "onnxruntime", "tensorrt", "tensorrt_rtx")
    options = "--preset tiny --device cpu --precision fp32 --size 64 --callers 1 --steps 2 --repeats 1".split()
    chosen = [part for name in engines for part in ("--engine", name)]
    done = subprocess.run(
        [sys.executable, SCRIPT, *options, *chosen, "-o", tmp_path / "gpu.json"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())["results"]["tiny"]
    for name in ("diffusers", "onnxruntime"):
        assert results[name]["parity"]["max"] < 1e-3
        (point,) = results[name]["points"]
        assert point["images_per_second"] > 0
        assert 0 < point["unet_tflop"] < 0.01
    assert "imprompt[gpu]" in results["tensorrt"]["skipped"]
    assert "skipped" in results["tensorrt_rtx"]
    assert "skipped: " in done.stdout
