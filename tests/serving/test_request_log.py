"""The line in the log, and the span, of each request that a server has answered."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from collector import Collector, collecting
from imprompt import Client, DeadlineExceeded, InvalidRequest
from imprompt_serving import metrics, request_log
from imprompt_serving.launcher import Server
from imprompt_serving.tracing import Tracer

BEAR = {"model": "world_lcm", "prompt": "clandestine bear", "num_inference_steps": 2}
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"


@pytest.fixture
def client(world: Server) -> Iterator[Client]:
    with Client(world.grpc_address, metadata={"traceparent": TRACEPARENT}) as client:
        yield client


@pytest.fixture
def line_of(log_file: Path) -> Callable[[str], dict[str, Any]]:
    """Wait for the line of a request."""

    def wait(request_id: str) -> dict[str, Any]:
        until = time.monotonic() + 30
        while time.monotonic() < until:
            found = [line for line in log_file.read_text().splitlines() if json.loads(line)["request_id"] == request_id]
            if found:
                assert len(found) == 1
                return dict(json.loads(found[0]))
            time.sleep(0.02)
        raise AssertionError(f"no line of {request_id}")

    return wait


def test_line_tells_how_a_request_went(client: Client, line_of: Callable[[str], dict[str, Any]]) -> None:
    began = time.monotonic()
    result = client.generate(**BEAR, request_id="log/1", num_images_per_prompt=2, guidance_scale=5.0)
    elapsed = time.monotonic() - began
    line = line_of("log/1")
    assert result.request_id == "log/1"
    assert (line["event"], line["bundle"], line["model"], line["status"]) == ("request", "world_lcm", "world_lcm", "OK")
    size = {"task": "text-to-image", "pictures": 2, "rows": 4, "steps": 2, "height": 64, "width": 64}
    assert size.items() <= line.items()
    assert "error" not in line
    assert line["stages"].keys() == result.timings.keys() - {"total"} <= metrics.STAGES.keys()
    for stage, seconds in line["stages"].items():
        assert seconds == pytest.approx(result.timings[stage], abs=1e-4)
    assert result.timings["total"] - 1e-4 <= line["seconds"] <= elapsed


def test_line_of_a_stream_names_the_model_and_the_callers_trace(
    world: Server, line_of: Callable[[str], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imprompt._tracing.trace", None)
    with Client(world.grpc_address, metadata={"traceparent": TRACEPARENT}) as client:
        for _ in client.stream(**BEAR, request_id="log/2"):
            pass
    line = line_of("log/2")
    assert (line["model"], line["trace_id"]) == ("world_lcm_stream", TRACE_ID)


def test_line_of_a_failed_request_has_the_name_of_its_error(
    client: Client, line_of: Callable[[str], dict[str, Any]]
) -> None:
    with pytest.raises(InvalidRequest) as invalid:
        client.generate(**BEAR | {"scheduler": "clandestine"})
    line = line_of(str(invalid.value.request_id))
    assert (line["status"], line["error"], line["parameter"]) == ("INVALID_ARGUMENT", "InvalidRequest", "scheduler")
    with pytest.raises(DeadlineExceeded) as late:
        client.generate(**BEAR | {"num_inference_steps": 1000}, timeout=0.5)
    line = line_of(str(late.value.request_id))
    assert (line["status"], line["error"], line["steps"]) == ("CANCELLED", "DeadlineExceeded", 1000)


def test_request_without_an_id_gets_one(world: Server, log_file: Path) -> None:
    before = log_file.read_text().count("\n") if log_file.exists() else 0
    request = service_pb2.ModelInferRequest(model_name="world_lcm")
    request.inputs.add(name="prompt", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(b"\1\0\0\0x")
    with grpc.insecure_channel(world.grpc_address, [("grpc.enable_http_proxy", 0)]) as channel:
        service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
    until = time.monotonic() + 30
    while len(lines := log_file.read_text().splitlines()) == before:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert len(json.loads(lines[-1])["request_id"]) == 32


def test_log_has_no_words_of_callers(client: Client, log_file: Path, line_of: Any) -> None:
    client.generate(**BEAR, request_id="log/3")
    line_of("log/3")
    assert "clandestine" not in log_file.read_text()


@pytest.mark.parametrize("steps", [2, None], ids=["picture", "refused"])
def test_span_continues_the_trace_of_the_caller_with_a_child_for_each_stage(
    world: Server, collector: Collector, monkeypatch: pytest.MonkeyPatch, steps: int | None
) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    monkeypatch.setattr("imprompt._tracing.trace", None)  # or else the parent would be the client's span
    request_id = f"span/{steps}"
    with Client(world.grpc_address, metadata={"traceparent": TRACEPARENT}) as client:
        if steps:
            result = client.generate(**BEAR, request_id=request_id)
        else:
            with pytest.raises(InvalidRequest):
                client.generate(**BEAR | {"scheduler": "none"}, request_id=request_id)
    span = collector.wait_for(lambda span: span.attributes.get("imprompt.request_id") == request_id)
    assert (span.trace_id, span.parent_id, span.service) == (TRACE_ID, PARENT_ID, "imprompt")
    assert span.attributes["imprompt.status"] == ("OK" if steps else "INVALID_ARGUMENT")
    stages = {child.name: child for child in collector.children(span)}
    if not steps:
        assert not stages
        return
    assert stages.keys() == result.timings.keys() - {"total"}
    assert all(span.began <= stage.began <= stage.ended <= span.ended for stage in stages.values())
    order = ["admission", "text_encoder", "preparation", "queue", "denoise", "vae_decoder"]
    assert sorted(stages, key=lambda name: stages[name].began) == order
    for name, stage in stages.items():
        assert (stage.ended - stage.began) / 1e9 == pytest.approx(result.timings[name], abs=1e-3)


CONFIG = """
backend: "python"
input [{ name: "x" data_type: TYPE_FP32 dims: [1] }]
output [{ name: "y" data_type: TYPE_FP32 dims: [1] }]
instance_group [{ kind: KIND_CPU }]
"""
MODEL = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [pb_utils.InferenceResponse(request.inputs()) for request in requests]
"""


@pytest.mark.skipif(
    importlib.util.find_spec("pytriton") is None and shutil.which("tritonserver") is None,
    reason="needs a Triton (the extra [server])",
)
def test_triton_sends_spans_of_requests_with_a_trace(tmp_path: Path) -> None:
    version = tmp_path / "repository/model/1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(MODEL)
    (version.parent / "config.pbtxt").write_text(CONFIG)
    request = service_pb2.ModelInferRequest(model_name="model", id="abc")
    request.inputs.add(name="x", datatype="FP32", shape=[1])
    request.raw_input_contents.append(bytes(4))
    with collecting() as collector:
        with (
            Server(tmp_path / "repository", triton_spans_to=collector.url) as server,
            grpc.insecure_channel(server.grpc_address, [("grpc.enable_http_proxy", 0)]) as channel,
        ):
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            stub.ModelInfer(request)
            stub.ModelInfer(request, metadata=(("traceparent", TRACEPARENT),))
        span = collector.wait_for(lambda span: span.parent_id == PARENT_ID)
    assert (span.trace_id, span.service) == (TRACE_ID, "triton")
    assert {one.trace_id for one in collector.spans} == {TRACE_ID}
    assert any(one.attributes.get("triton.request_id") == "abc" for one in collector.spans)


def test_reader_that_blocks_does_not_hold_requests_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_log, "CLOSE_S", 0.1)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    log = request_log.RequestLog(str(pipe))
    began = time.monotonic()
    for _ in range(request_log.MAX_QUEUED + 1000):  # more than the pipe and the queue hold
        log.write({"x": "y" * 1000})
    log.close()
    assert time.monotonic() - began < 10
    os.close(reader)


def test_log_can_be_rotated(tmp_path: Path) -> None:
    log = request_log.RequestLog(str(tmp_path / "log"))
    log.write({"n": 1})
    until = time.monotonic() + 10
    while not (tmp_path / "log").read_text():
        assert time.monotonic() < until
        time.sleep(0.01)
    (tmp_path / "log").rename(tmp_path / "log.1")
    log.write({"n": 2})
    log.close()
    assert (tmp_path / "log.1").read_text() == '{"n":1}\n'
    assert (tmp_path / "log").read_text() == '{"n":2}\n'


def test_without_a_file_nothing_is_logged(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("IMPROMPT_REQUEST_LOG", raising=False)
    log = request_log.RequestLog.from_environment()
    log.write({"n": 1})
    log.close()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("endpoint", ["", "http://127.0.0.1:1"])
def test_without_a_collector_or_the_extra_there_is_no_tracer(
    endpoint: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    assert Tracer.from_environment() is None
    assert ('pip install "imprompt[otel]"' in caplog.text) == bool(endpoint)
