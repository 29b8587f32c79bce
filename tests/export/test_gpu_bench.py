"""The GPU benchmark runs, with small networks on the CPU."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from imprompt_serving.backends import EngineError
from imprompt_serving.backends import onnxruntime as onnxruntime_engine

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


@pytest.fixture(scope="module")
def bench() -> Any:
    """Import the script as a module."""
    spec = importlib.util.spec_from_file_location("gpu_bench", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.fixture(scope="module")
def case(bench: Any) -> Any:
    return bench.Case("tiny")


def options(**given: Any) -> argparse.Namespace:
    points = {(callers, 64): 1e6 for callers in (1, 2, 3)}
    base = {"device": "cpu", "dtype": torch.float32, "size": [64], "callers": [1, 2, 3], "steps": 1, "repeats": 1}
    return argparse.Namespace(**base | {"flops": points, "peak": 1e9} | given)


def test_a_point_that_fails_leaves_the_others(
    bench: Any, case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unet(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        if len(tensors["sample"]) == 4:
            raise MemoryError("too large")
        return tensors["sample"]

    def make(*_: Any) -> Any:
        return unet, lambda tensors: tensors["latents"]

    monkeypatch.setitem(bench.ENGINES, "frail", make)
    expected = case.inputs(2, 64, "cpu")["sample"]
    found = bench.measure("frail", case, tmp_path, options(), expected)
    first, failed, last = found["points"]
    assert failed == {"size": 64, "callers": 2, "skipped": "MemoryError: too large"}
    assert first["images_per_second"] > 0
    assert last["images_per_second"] > 0
    assert found["parity"]["max"] == 0
    bench.show("frail", found)
    assert "64 px, 2 callers: skipped: MemoryError" in capsys.readouterr().out


def test_inputs_are_contiguous(bench: Any, case: Any) -> None:
    """Compiled code reads raw memory: an expanded timestep would hold one number where the code reads many."""
    seen: list[dict[str, torch.Tensor]] = []

    def unet(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.append(tensors)
        return tensors["sample"]

    bench.picture(unet, lambda tensors: tensors["latents"], case.inputs(4, 64, "cpu"), 2)
    assert len(seen) == 2
    assert all(tensor.is_contiguous() for tensors in seen for tensor in tensors.values())


def test_an_engine_has_a_profile_for_each_shape(bench: Any, case: Any) -> None:
    axes = case.axes(4, 64)
    profile = bench._profile(case.unet, axes)
    assert profile["sample"] == ((4, 4, 8, 8),) * 3
    assert {name: list(shape) for name, (shape, _, _) in profile.items()} == {
        name: list(tensor.shape) for name, tensor in case.unet.example(axes).items()
    }


def test_networks_come_back_from_a_compiler_that_fails(
    bench: Any, case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler")

    moved: list[str] = []
    monkeypatch.setattr(case.unet.module, "to", moved.append)
    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(RuntimeError, match="no compiler"):
        bench.aot_inductor(case, [case.axes(2, 64)], tmp_path, options(device="cpu:0"))
    assert moved == ["cpu:0", "cpu"]


def test_onnxruntime_for_cpus_is_named_before_anything_is_exported(
    bench: Any, case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime_engine, "built_for_cuda", lambda: False)
    with pytest.raises(EngineError, match="onnxruntime-gpu"):
        bench.ENGINES["onnxruntime"](case, [case.axes(2, 64)], tmp_path, options(device="cuda"))
    assert not list(tmp_path.iterdir())


def test_few_packages_are_needed() -> None:
    """The benchmark starts without the packages that only exports to ONNX need."""
    missing = ("onnx", "onnxscript", "onnxruntime", "tritonclient", "peft", "rich")
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({missing!r})); "
        f"sys.argv = ['bench.py', '--help']; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
