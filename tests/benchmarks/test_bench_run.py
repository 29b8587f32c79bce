"""A short run of `imprompt bench`: every scenario against a served bundle, the baselines, and the report."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import numpy as np
import pytest

from imprompt_bench import baselines, cli, report
from imprompt_bench.baselines import BareLoop, Diffusers
from imprompt_bench.checkpoints import check_memory, parameters, write
from imprompt_bench.presets import PRESETS
from imprompt_bench.results import BenchError, Run
from imprompt_bench.session import SCENARIOS
from imprompt_bench.systems import Answer, check_same_picture, served_system
from imprompt_bench.target import engine_sizes
from imprompt_bench.workload import Workload
from imprompt_export.bundle import BundleFile
from served import Served

ROOT = Path(__file__).parents[2]
PAGES = tuple(ROOT / "docs" / f"{name}.md" for name in ("performance", "benchmarks", "scale"))
RESULTS = ROOT / "benchmarks/results"
WORKLOAD = Workload(model="sd15", adapter="plain", size=64, steps=2, smallest=32)


@pytest.fixture(scope="module")
def measured(served: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run every scenario with few samples, and return the JSON file."""
    server = served("sd15").server  # type: ignore[operator]
    output = tmp_path_factory.mktemp("bench") / "run.json"
    address = ["--url", server.grpc_address, "--metrics", server.metrics_address, "--model", "sd15"]
    extent = ["--size", "64", "--steps", "2", "--requests", "4", "--callers", "1", "--callers", "4"]
    assert cli.main([*address, *extent, "-o", str(output)]) == 0
    return output


def test_every_scenario_is_measured(measured: Path) -> None:
    run = Run.load(measured)
    assert {measurement.scenario for measurement in run.measurements} == set(SCENARIOS)
    assert [point.value for point in run.of("closed")] == [1, 4]
    for measurement in run.measurements:
        assert {sample.status for sample in measurement.samples} <= {"ok", "refused", "left"}, measurement.label
        assert all(0 < latency < 60 for latency in measurement.latencies())
    assert {measurement.label for measurement in run.of("growth")} == {"steps", "size", "image prompts", "pictures"}


def test_server_counters_cover_only_their_measurement(measured: Path) -> None:
    alone = Run.load(measured).of("closed")[0]
    assert alone.server is not None
    assert alone.server.unet_calls == 12  # four requests of two steps, which PNDM runs in three calls
    assert alone.server.rows_per_call == 2
    assert alone.server.cache_hits == 0
    assert alone.server.cache_misses == 12  # two prompts and one picture per request
    stages = alone.samples[0].timings
    assert 0 < stages["denoise"] < stages["total"] <= alone.samples[0].latency


def test_report_updates_the_page_and_plots(measured: Path, tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text("before\n<!-- results -->\nold\n<!-- end -->\nafter\n")
    assert cli.main(["report", "--results", str(measured.parent), "--page", str(page)]) == 0
    text = page.read_text()
    assert "old" not in text
    for title in ("One request at a time", "Throughput by number of callers", "Random arrivals", "Overload", "Mixed"):
        assert f"### {title}" in text
    for plot in ("load", "growth", "request"):
        assert f"images/bench-run-{plot}.svg" in text
        assert (tmp_path / f"images/bench-run-{plot}.svg").read_text().startswith("<?xml")


def test_summary_has_a_line_for_each_run_with_baselines(measured: Path) -> None:
    run = Run.load(measured)
    (own,) = run.of("latency")
    slower = [msgspec.structs.replace(sample, ended=sample.sent + 2 * sample.latency) for sample in own.samples]
    eager = msgspec.structs.replace(own, label="eager", samples=slower)
    beside = msgspec.structs.replace(run, measurements=[own, eager])
    assert report.summary({"alone": run}) == ""
    line = report.summary({"alone": run, "both": beside}).splitlines()[-2]
    assert line.startswith("| [both](benchmarks.md#both) | sd15, onnxruntime, fp32 | 64 x 64 | 2 |")
    assert re.search(r"\| \d\.\d\d \([^|]*\| 2\.00 \([^|]*\|$", line), line


def test_summary_never_mixes_machines(measured: Path) -> None:
    """The tables of later days come first."""
    run = Run.load(measured)
    (own,) = run.of("latency")
    here = msgspec.structs.replace(run, measurements=[own, msgspec.structs.replace(own, label="bare")])
    there = msgspec.structs.replace(here, environment=here.environment | {"machine": "01234567"})
    later = msgspec.structs.replace(here, environment=here.environment | {"date": "2030-01-01"})
    tables = report.summary({"first": here, "there": there, "later": later, "second": here}).split("\n### ")[1:]
    assert [part.count("\n| [") for part in tables] == [1, 2, 1]
    assert "2030-01-01" in tables[0]
    assert "01234567" in tables[2]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_are_up_to_date(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert report.filled(text, RESULTS, page.parent / "images") == text, "run: imprompt bench report"


def test_bare_engines_produce_the_same_picture_as_the_server(sd15: Served) -> None:
    bare = BareLoop(sd15.bundle.repository, "sd15")
    expected, other = (served_system(sd15.client)(WORKLOAD.request(index)) for index in (1, 2))
    largest, mean = check_same_picture("bare", bare(WORKLOAD.request(1)), expected, exact=True)
    assert largest <= 2
    assert mean <= 0.1
    with pytest.raises(BenchError, match="a different picture"):
        check_same_picture("bare", other, expected, exact=True)


def test_pictures_of_a_preset_depend_on_the_image_prompt(tmp_path: Path) -> None:
    made = write(tmp_path, "tiny", PRESETS["tiny"], backend="onnxruntime", precision="fp32")
    assert BundleFile.load(made.bundle).motion_adapter is not None
    pipeline = Diffusers(tmp_path)
    request = WORKLOAD.request(1)
    first, other = (
        pipeline(request | {"ip_adapter_image": WORKLOAD.request(index)["ip_adapter_image"]}) for index in (1, 2)
    )
    assert first.picture.shape == (64, 64, 3)
    assert np.ptp(first.picture) > 100
    with pytest.raises(BenchError):
        check_same_picture("eager", other, Answer(first.picture, {}), exact=True)


def test_presets_have_the_size_of_the_public_checkpoints() -> None:
    """Compare the numbers of weights, in millions."""
    assert {name: round(count / 1e6) for name, count in parameters(PRESETS["sd15"]).items()} == {
        "unet": 860,
        "vae": 84,
        "text_encoder": 123,
        "image_encoder": 632,
    }
    assert round(parameters(PRESETS["sdxl"])["unet"] / 1e6) == 2567


def test_engine_sizes_include_external_weights(tmp_path: Path) -> None:
    files = ("m_denoiser/1/unet.onnx", "m_denoiser/1/unet.onnx.data", "m_vae_decoder/1/model.onnx", "m/1/bundle.json")
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(bytes(2**19))
    assert engine_sizes(tmp_path) == {"m_denoiser/unet": 1.0, "m_vae_decoder": 0.5}


def test_error_if_a_preset_does_not_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = type("Memory", (), {"available": 2**30})
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    with pytest.raises(BenchError, match=r"needs about 6 GiB of memory; 1 GiB"):
        check_memory(PRESETS["sd15"])
    check_memory(PRESETS["tiny"])
    baselines.check_memory("eager", parameters(PRESETS["tiny"]), 64)
    for name, gib in (("eager", 8), ("compiled", 15)):  # 1.7 billion weights, and 2 GiB of attention
        with pytest.raises(BenchError, match=rf"baseline {name} needs about {gib} GiB of memory; 1 GiB"):
            baselines.check_memory(name, parameters(PRESETS["sd15"]), 512)
    with pytest.raises(BenchError, match="baseline eager needs about 4 GiB of memory; 1 GiB"):
        baselines.check_memory("eager", parameters(PRESETS["sd15"]), 512, "bf16")


def test_url_and_preset_are_mutually_exclusive(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--url", "localhost:1", "--preset", "tiny"]) == 2
    assert "--preset" in capsys.readouterr().err


def test_costs_of_long_prompts(bundle: object, capsys: pytest.CaptureFixture[str]) -> None:
    repository = str(bundle("sd15").repository)  # type: ignore[operator]
    assert cli.main(["prompts", repository, "--model", "sd15", "--rounds", "1"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "chunks"
    assert [line.split()[0] for line in rows] == ["1", "2", "4", "8"]
    assert all(float(value) > 0 for line in rows for value in line.split())
    assert cli.main(["prompts", repository, "--model", "other"]) == 1
    assert "no bundle other in" in capsys.readouterr().err
