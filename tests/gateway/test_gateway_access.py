"""Ids, the access log, and traces: what can be found out later about a request to the gateway."""

from __future__ import annotations

import json
import os
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from starlette.testclient import TestClient

from collector import Collector
from gateway.conftest import running
from imprompt import AsyncClient, InvalidRequest
from imprompt_gateway.app import create_app
from imprompt_serving.launcher import Server

GENERATIONS = "/v1/images/generations"
FLOWER = {"model": "world", "prompt": "clandestine flower"}
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Refusing(AsyncClient):
    """A client that refuses each request, and remembers its id."""

    async def generate(self, *, request_id: str | None = None, **others: Any) -> Any:
        self.request_id = request_id
        raise InvalidRequest("eta: clandestine", parameter="eta", request_id=request_id)


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "access.jsonl"
    monkeypatch.setenv("IMPROMPT_REQUEST_LOG", str(file))
    return file


@pytest.fixture
def refusing() -> Refusing:
    return Refusing("127.0.0.1:1")


@pytest.fixture
def http(log: Path, refusing: Refusing) -> Iterator[TestClient]:
    with TestClient(create_app(refusing, keys=["key"]), raise_server_exceptions=False) as http:
        yield http


def lines(log: Path, count: int) -> list[dict[str, Any]]:
    """Wait for this many lines."""
    until = time.monotonic() + 10
    while len(found := log.read_text().splitlines() if log.exists() else []) < count:
        assert time.monotonic() < until
        time.sleep(0.01)
    return [json.loads(line) for line in found]


def test_id_of_the_caller_goes_through_everything(http: TestClient, refusing: Refusing, log: Path) -> None:
    headers = {"X-Request-Id": "mine/1", "Authorization": "Bearer key"}
    answer = http.post(GENERATIONS, json=FLOWER, headers=headers)
    assert (answer.status_code, answer.headers["X-Request-Id"]) == (400, "mine/1")
    assert refusing.request_id == "mine/1"
    [line] = lines(log, 1)
    expected = {"event": "access", "request_id": "mine/1", "method": "POST", "route": GENERATIONS, "status": 400}
    assert (expected | {"error": "invalid_value"}).items() <= line.items()
    assert 0 <= line["seconds"] < 10
    assert "clandestine" not in log.read_text()


@pytest.mark.parametrize("given", [None, "", "a b", "x" * 129, "\xe4"])
def test_requests_without_a_usable_id_get_one(http: TestClient, given: str | None, log: Path) -> None:
    headers = {} if given is None else {b"X-Request-Id": given.encode("latin-1")}
    answers = [http.post(GENERATIONS, json=FLOWER, headers=headers) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [401, 401]
    ids = [answer.headers["X-Request-Id"] for answer in answers]
    assert all(len(one) == 32 for one in ids)
    assert ids[0] != ids[1]
    assert [line["request_id"] for line in lines(log, 2)] == ids


def test_unexpected_errors_have_the_id_too(http: TestClient, monkeypatch: pytest.MonkeyPatch, log: Path) -> None:
    monkeypatch.setattr("imprompt_gateway.images.read_request", lambda *_, **__: 1 / 0)
    headers = {"X-Request-Id": "mine/2", "Authorization": "Bearer key"}
    answer = http.post(GENERATIONS, json=FLOWER, headers=headers)
    assert (answer.status_code, answer.headers["X-Request-Id"]) == (500, "mine/2")
    assert lines(log, 1)[0]["status"] == 500


def test_probes_are_only_logged_if_they_fail(http: TestClient, log: Path) -> None:
    http.get("/livez")
    http.get("/metrics")
    http.get("/readyz")  # there is no server
    http.get("/clandestine")
    found = [(line.get("route"), line["status"]) for line in lines(log, 2)]
    assert found == [("/readyz", 503), (None, 404)]
    assert "clandestine" not in log.read_text()


def test_one_trace_and_one_id_from_the_caller_to_the_server(
    world: Server, collector: Collector, log_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    access, opener = tmp_path / "access.jsonl", urllib.request.build_opener(urllib.request.ProxyHandler({}))
    environment = {"OTEL_BSP_SCHEDULE_DELAY": "100", "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
    with (
        mock.patch.dict(os.environ, environment),
        running("--url", world.grpc_address, "--request-log", str(access)) as address,
    ):
        for index, stream in enumerate((False, True)):
            headers = {"Content-Type": "application/json", "X-Request-Id": f"chain/{index}"}
            headers["traceparent"] = f"00-{TRACE_ID}-{PARENT_ID}-01"
            body = {**FLOWER, "num_inference_steps": 2, "stream": stream}
            request = urllib.request.Request(f"{address}{GENERATIONS}", json.dumps(body).encode(), headers)
            with opener.open(request, timeout=60) as answer:
                answer.read()
                assert (answer.status, answer.headers["X-Request-Id"]) == (200, f"chain/{index}")

        def span(service: str, name: str, request_id: str) -> Any:
            return collector.wait_for(
                lambda one: (
                    (one.service, one.name, one.attributes.get("imprompt.request_id")) == (service, name, request_id)
                )
            )

        for index, (method, model) in enumerate((("generate", "world"), ("stream", "world_stream"))):
            served = span("imprompt", model, f"chain/{index}")
            called = span("imprompt-gateway", f"{method} world", f"chain/{index}")
            received = span("imprompt-gateway", f"POST {GENERATIONS}", f"chain/{index}")
            assert {one.trace_id for one in (served, called, received)} == {TRACE_ID}
            assert (received.parent_id, called.parent_id, served.parent_id) == (PARENT_ID, received.id, called.id)
            assert received.attributes["http.response.status_code"] == 200
    logged = {line["request_id"]: line for line in lines(access, 2)}
    served_lines = [json.loads(line) for line in log_file.read_text().splitlines()]
    for request_id in ("chain/0", "chain/1"):
        [line] = [line for line in served_lines if line["request_id"] == request_id]
        assert line["trace_id"] == logged[request_id]["trace_id"] == TRACE_ID
