"""The benchmark for GPUs measures small networks on the CPU, and accounts for everything that fails."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from gpu import calls, denoiser, driver, picture, systems, trained, worker
from gpu.locks import alone, compiling
from gpu.networks import Networks, run_diffusers, unet_flop
from gpu.plan import Options, Task, tasks
from gpu.record import Record, measurement
from gpu.systems import System
from gpu.trained import GraphEngine
from imprompt_bench.presets import PRESETS
from imprompt_bench.results import BenchError, Measurement, Run
from imprompt_export import graphs
from imprompt_serving import tensor_names

EAGER = Task(name="tiny-eager", system="eager", preset="tiny", stages=("unet",), rows=(2,))


@pytest.fixture
def options(tmp_path: Path) -> Options:
    work = tmp_path / "work"
    work.mkdir()
    made = Options(
        presets=("tiny",),
        stages=("parity", "unet", "picture", "denoiser", "served"),
        device="cpu",
        precisions=("fp32",),
        steps=2,
        repeats=2,
        budget_s=60.0,
        began=time.time(),
        output=str(tmp_path / "results"),
        work=str(work),
        command="python benchmarks/gpu",
    )
    made.save()
    return made


@pytest.fixture(scope="module")
def networks() -> Networks:
    return Networks(PRESETS["tiny"], "cpu")


@pytest.fixture(scope="module")
def own(networks: Networks) -> System:
    """The graphs of imprompt, run by PyTorch."""
    made = Networks(PRESETS["tiny"], "cpu")
    inputs = {rows: made.inputs(rows) for rows in (2, 8)}
    flop = {rows: unet_flop(made.preset, rows) for rows in inputs}
    bundle = made.bundle(8, "fp32")
    unet, vae = GraphEngine(made.graph()), GraphEngine(graphs.vae_decoder(made.vae))
    return System(
        label="graph",
        networks=made,
        dtype=torch.float32,
        inputs=inputs,
        unet=lambda tensors: unet.run_tensors(tensors)["noise_pred"],
        decoders={"fp32": lambda tensors: vae.run_tensors(tensors)["images"]},
        engine=unet,
        bundle=bundle,
        flop=flop,
        expected=run_diffusers(networks.unet, inputs[2], torch.float32),
        expected_pictures=vae.run_tensors({"latents": _latents(made)})["images"],
    )


def _latents(made: Networks) -> torch.Tensor:
    side = made.size // 8
    return torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0))


def test_both_sides_compute_the_same(own: System, options: Options) -> None:
    """A comparison of times means nothing otherwise; another scale of the image prompt would be noticed."""
    unet, vae = calls.parity(own, options)
    assert unet.notes["max"] < 1e-4
    assert vae.notes["levels_max"] == 0
    name = tensor_names.ip_scale("plain")
    changed = own.unet({**own.inputs[2], name: own.inputs[2][name] + 0.3})
    assert own.expected is not None
    assert calls.difference(changed, own.expected)["max"] > 1e-3


def test_calls_are_timed(own: System, options: Options) -> None:
    found, larger = calls.unet(own, options)
    assert (found.value, larger.value) == (2, 8)
    assert len(found.samples) == options.repeats
    assert found.notes["tflop"] == pytest.approx(own.flop[2] / 1e12)
    assert found.notes["share_of_roof"] > 0


def test_a_picture_is_timed_in_both_loops(own: System, options: Options) -> None:
    eager = systems.eager(EAGER, options)
    for system in (own, eager):
        decode, whole = picture.picture(system, options)
        assert "alone" in decode.label
        assert whole.value == 1
        assert min(whole.latencies()) > 0
        assert "2 steps" in whole.label


def test_inputs_of_compiled_code_are_contiguous(networks: Networks) -> None:
    """It goes by addresses: a timestep that is expanded has one number where it reads many."""
    seen: list[torch.Tensor] = []

    def unet(tensors: Any) -> torch.Tensor:
        seen.extend(tensors.values())
        return tensors["sample"]

    picture.plain_loop(unet, lambda tensors: tensors["latents"], networks.inputs(2), 2)
    assert seen
    assert all(tensor.is_contiguous() for tensor in seen)


def test_the_denoiser_is_measured(own: System, options: Options) -> None:
    options = msgspec.structs.replace(options, steps=8)  # the first ticks may be another caller's alone
    found = {(each.label, each.value): each for each in denoiser.denoiser(own, options)}
    for callers in (1, 4):
        notes = found["callers", callers].notes
        assert notes["pictures_per_s"] > 0
        assert notes["calls_per_step"] == pytest.approx(1, abs=0.51)
        assert 1 <= notes["most_ticks_in_flight"] <= 2
    assert found["cancel until answered", None].notes["most_ticks_after"] <= 2
    assert found["join until the first step is told", None].notes["most_ticks"] >= 1
    assert found["ticks while VAE fp32 decodes", 1].notes["pictures_decoded"] >= 1
    assert len(found["ticks alone", 1].samples) >= 2 * options.steps


def test_the_embedded_bundle_is_compared_by_scheduler(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """With PyTorch on both sides; a device that is off by a thousandth shows. PNDM cannot do two steps."""
    task = Task(name="trained-fp32", system="trained", preset="trained", stages=("parity",), precision="fp32")

    class Off(GraphEngine):
        def run_tensors(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: 1.001 * tensor for name, tensor in super().run_tensors(tensors).items()}

    def engines(*given: Any) -> trained.Side:
        *_, unet, decoder = given
        return trained.Side(unet=Off(unet), decoder=GraphEngine(decoder), device=torch.device("cpu"))

    monkeypatch.setattr(trained, "_engines", engines)
    monkeypatch.setattr(trained, "SCHEDULERS", ("DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"))
    made = trained.prepare(task, options)
    found: list[Measurement] = []
    with pytest.raises(BenchError, match="PNDMScheduler: "):
        found.extend(trained.parity(made, options))
    assert [each.label for each in found] == ["fp32, DDIMScheduler", "fp32, EulerDiscreteScheduler"]
    for each in found:
        assert 1e-6 < each.notes["latents_max"] < 0.1 * each.notes["latents_largest"]
        assert each.notes["levels_mean"] < 5


def test_tasks(options: Options) -> None:
    on_gpu = msgspec.structs.replace(options, device="cuda", presets=("sd15", "sdxl"), precisions=("fp16", "fp8"))
    found = {task.name: task for task in tasks(on_gpu)}
    assert list(found)[:2] == ["sd15-inductor-fp16", "sd15-inductor-fp8"]
    assert found["sdxl-inductor-fp16"].stages == ("parity", "unet", "picture", "denoiser")
    assert found["sdxl-inductor-fp8"].stages == ("parity", "unet")
    assert {"sd15-compiled-2", "sd15-compiled-8", "sd15-compiled-16", "trained-fp8", "served"} <= set(found)
    alone = tasks(msgspec.structs.replace(on_gpu, stages=("picture",)))
    assert {stage for task in alone for stage in task.stages} == {"picture"}
    assert on_gpu.baseline_precision == "fp16"


def test_nothing_is_timed_while_something_compiles(tmp_path: Path) -> None:
    order: list[str] = []

    def time_something() -> None:
        with alone(tmp_path):
            order.append("timed")

    with compiling(tmp_path), compiling(tmp_path):  # side by side
        thread = threading.Thread(target=time_something)
        thread.start()
        thread.join(0.3)
        order.append("compiled")
    thread.join(10)
    assert order == ["compiled", "timed"]


def _started(options: Options, *stages: str) -> Record:
    record = Record(options)
    for stage in stages:
        record.start(stage, "tiny", {})
    return record


def _loaded(record: Record, stage: str) -> Run:
    return Run.load(record.file(stage, "tiny"))


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks prepare nothing, and their calls take no time."""

    def stage(*_: Any) -> Iterator[Measurement]:
        yield measurement("unet", "nothing", [0.5, 0.5])
        raise MemoryError("too large")

    monkeypatch.setitem(worker.SYSTEMS, "eager", "builtins:print")
    monkeypatch.setattr(worker, "_load", lambda path: stage if path.startswith("gpu.") else lambda *_: None)


@pytest.mark.usefixtures("system")
def test_a_stage_that_fails_leaves_what_it_measured(options: Options) -> None:
    record = _started(options, "unet", "picture")
    assert worker.run("tiny-eager", options) == 0
    run = _loaded(record, "unet")
    assert [each.latencies() for each in run.measurements] == [[0.5, 0.5]]
    assert run.skipped == {"tiny-eager": "MemoryError: too large"}
    assert _loaded(record, "picture").skipped


@pytest.mark.usefixtures("system")
def test_a_stage_that_begins_too_late_is_skipped(options: Options) -> None:
    record = _started(options, "unet", "picture")
    late = msgspec.structs.replace(options, budget_s=0.0)
    worker.run("tiny-eager", late)
    run = _loaded(record, "unet")
    assert not run.measurements
    assert run.skipped == {"tiny-eager": "the budget of 0 s was over"}


def test_a_system_that_cannot_be_made_says_why(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    record = _started(options, "unet", "picture")
    monkeypatch.setitem(worker.SYSTEMS, "eager", "no_such_package:eager")
    worker.run("tiny-eager", options)
    for stage in ("unet", "picture"):
        assert _loaded(record, stage).skipped == {
            "tiny-eager": "ModuleNotFoundError: No module named 'no_such_package'"
        }


PROGRAM = """
import os, sys
from gpu import cli, worker
from gpu.record import measurement

def unet(*_):
    yield measurement("unet", "eager", [0.5], value=2)

def picture(*_):
    yield measurement("picture", "eager", [0.5])
    os._exit(3)

stages = {"print": print, "unet": unet, "picture": picture}
worker.SYSTEMS["eager"] = "print"
worker.STAGES |= {"unet": "unet", "picture": "picture"}
worker._load = stages.get
raise SystemExit(cli.main(sys.argv[1:]))
"""
"""Systems that take no time to prepare; the process ends in the middle of the stage `picture`."""


@pytest.mark.timeout(120)
def test_processes_that_die_leave_the_others(options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(driver, "PROGRAM", (sys.executable, str(tmp_path / "program.py")))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "benchmarks"))
    dies = msgspec.structs.replace(EAGER, stages=("unet", "picture"))
    unknown = msgspec.structs.replace(EAGER, name="unknown", stages=("unet", "picture"))
    monkeypatch.setattr(driver, "tasks", lambda _: [unknown, dies])
    assert driver.run(options) == 0
    unet, picture = (_loaded(Record(options), stage) for stage in ("unet", "picture"))
    for run in (unet, picture):
        assert [each.label for each in run.measurements] == ["eager"]
        assert "the process ended with 1" in run.skipped["unknown"]
        assert run.environment["cores"]
        assert run.command == options.command
    assert list(unet.skipped) == ["unknown"]
    assert "the process ended with 3" in picture.skipped["tiny-eager"]
