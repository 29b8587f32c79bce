"""Load generation, server metrics, and the requests of a benchmark, without a real server."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from imprompt import ConnectionFailed
from imprompt_bench import cli, load, target
from imprompt_bench.load import closed_loop, open_loop
from imprompt_bench.observe import Observer, count
from imprompt_bench.plots import spans
from imprompt_bench.results import BenchError, Run, Sample
from imprompt_bench.target import Target
from imprompt_bench.workload import POOL, Workload

SLOW_S = 0.05
WORKLOAD = Workload(model="m", adapter="plain", size=64, steps=4, smallest=32)


class Server:
    """Handles one request at a time, each in `SLOW_S`."""

    def __init__(self) -> None:
        self.busy, self.waiting, self.most_waiting = asyncio.Lock(), 0, 0
        self.began = time.perf_counter()

    async def ask(self, index: int, intended: float | None) -> Sample:
        sent = time.perf_counter() - self.began
        self.waiting += 1
        self.most_waiting = max(self.most_waiting, self.waiting)
        async with self.busy:
            await asyncio.sleep(SLOW_S)
        self.waiting -= 1
        ended = time.perf_counter() - self.began
        return Sample(index=index, intended=sent if intended is None else intended, sent=sent, ended=ended)


def test_closed_loop_callers_wait_for_results() -> None:
    async def measure() -> tuple[Server, list[Sample]]:
        server = Server()
        return server, await closed_loop(server.ask, 12, 3)

    server, samples = asyncio.run(measure())
    assert sorted(sample.index for sample in samples) == list(range(12))
    assert server.most_waiting == 3


def test_open_loop_arrivals_do_not_wait_for_the_server() -> None:
    """All eight are due at once; the latency of the last includes waiting for the seven before it."""

    async def measure() -> tuple[Server, list[Sample]]:
        server = Server()
        return server, await open_loop(server.ask, [0.01] * 8)

    server, samples = asyncio.run(measure())
    assert server.most_waiting == 8
    latencies = sorted(sample.latency for sample in samples)
    assert latencies[-1] >= 8 * SLOW_S
    assert latencies[0] < 4 * SLOW_S


def test_counters_include_only_models_of_the_bundle() -> None:
    page = "\n".join(
        [
            "# HELP imprompt_tick_rows Rows",
            'imprompt_tick_rows_count{model="sd15_denoiser"} 3',
            'imprompt_tick_rows_sum{model="sd15_denoiser"} 12',
            'imprompt_tick_rows_bucket{model="sd15_denoiser",le="1"} 0',
            'imprompt_tick_rows_count{model="sd15_face_denoiser"} 100',
            'nv_cache_num_hits_per_model{model="sd15_text_encoder",version="1"} 5',
            'nv_cache_num_hits_per_model{model="sd15_image_encoder_plain",version="1"} 2',
            'imprompt_jobs_refused_total{limit="rows",model="sd15_denoiser"} 1',
        ]
    )
    counted = count(page, "sd15")
    assert counted == {"unet_calls": 3, "rows": 12, "cache_hits": 7, "cache_misses": 0, "refused": 1}


def test_error_for_missing_metrics_names_the_address() -> None:
    with pytest.raises(BenchError, match=r"no metrics at 127\.0\.0\.1:1: .*--metrics"):
        Observer(bundle="sd15", metrics_address="127.0.0.1:1").snapshot()


@contextmanager
def page(text: str, status: int = 200) -> Iterator[str]:
    """Run a server that returns `text` for every page, and yield its address."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_metrics_of_another_server_are_rejected() -> None:
    with page('nv_inference_count{model="sd15",version="1"} 0') as address:
        Observer(bundle="sd15", metrics_address=address).check()
        with pytest.raises(BenchError, match="do not belong to sdxl"):
            Observer(bundle="sdxl", metrics_address=address).check()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1", "a b", "", "127.0.0.1:x", "\n"])
def test_address_without_metrics_raises_bench_error(address: str) -> None:
    with pytest.raises(BenchError, match="set --metrics"):
        Observer(bundle="sd15", metrics_address=address).check()


def test_losing_the_metrics_loses_only_the_counters() -> None:
    with page("") as address, Observer(bundle="sd15", metrics_address=address).watch() as use:
        assert use() is not None
    with Observer(bundle="sd15", metrics_address=address).watch() as use:
        assert use() is None
    with Observer(bundle="sd15", metrics_address=None).watch() as use:
        assert use() is None


def test_measurements_before_an_error_are_saved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(url: str, plan: object, traffic: object) -> list[Sample]:
        if runs.pop(0) == "fails":
            raise ConnectionFailed(f"{url}: gone")
        return [Sample(index=0, intended=0.0, sent=0.0, ended=1.0)]

    runs = ["works", "fails"]
    limits = {"height": [32, 256]}
    capabilities: Any = {"limits": limits, "defaults": {"height": 64}, "backend": "b", "precision": "fp32"}
    observer = Observer(bundle="sd15", metrics_address=None)
    served = Target(url="h:1", model="sd15", capabilities=capabilities | {"ip_adapters": []}, observer=observer)
    monkeypatch.setattr(target, "connect", lambda *_: served)
    monkeypatch.setattr(load, "run", run)
    output = tmp_path / "new" / "run.json"
    arguments = ["--url", "h:1", "--model", "sd15", "--scenario", "closed", "--callers", "2", "-o", str(output)]
    assert cli.main(arguments) == 1
    assert [point.value for point in Run.load(output).of("closed")] == [1]
    captured = capsys.readouterr()
    assert captured.out == f"{output}\n"
    assert "no metrics of sd15 on port 8002: leaving out server counters" in captured.err
    assert "error: h:1: gone" in captured.err


def test_unwritable_output_fails_before_measuring(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--url", "127.0.0.1:1", "--model", "sd15", "-o", str(tmp_path)]) == 1
    assert "cannot write to" in capsys.readouterr().err


def test_requests_have_unique_prompts_and_pictures() -> None:
    first, second = (WORKLOAD.request(index) for index in (1, 2))
    assert first["prompt"] != second["prompt"]
    assert first["ip_adapter_image"]["plain"][0].tobytes() != second["ip_adapter_image"]["plain"][0].tobytes()
    assert WORKLOAD.request(1) == first


def test_mixed_traffic_varies_its_requests() -> None:
    planned = [WORKLOAD.mixed(index, 1.0) for index in range(100)]
    assert {plan.arguments["height"] for plan in planned} == {32, 64}
    assert {plan.arguments["num_inference_steps"] for plan in planned} == {2, 4, 8}
    assert {plan.kind for plan in planned} == {"text", "image", "repeated"}
    assert len({plan.arguments["prompt"] for plan in planned if plan.kind == "repeated"}) == POOL
    assert all(("ip_adapter_image" in plan.arguments) == (plan.kind != "text") for plan in planned)
    leaving = [plan.leaves_after for plan in planned if plan.leaves_after is not None]
    assert 5 <= len(leaving) <= 30
    assert all(0 < seconds < 1 for seconds in leaving)


def test_spans_overlap_for_concurrent_stages() -> None:
    timings = {"admission": 1, "text_encoder": 4, "preprocess": 1, "image_encoder": 2, "queue": 0.5, "denoise": 9}
    placed = {stage: (begin, length) for stage, begin, length in spans(timings)}
    assert placed["text_encoder"] == (1, 4)
    assert placed["image_encoder"] == (2, 2)
    assert placed["denoise"] == pytest.approx((5.5, 9))
    assert "vae_encoder" not in placed
