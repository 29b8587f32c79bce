"""Spans of the client, and ids that callers choose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from fake_triton import FakeTriton, in_turn, picture_answer, refuse

from imprompt import InvalidRequest, ServerError, _tracing

pytest.importorskip("opentelemetry.sdk")

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """The spans that have ended."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    return exporter


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_span_covers_all_attempts_and_the_server_continues_its_trace(
    any_client: Any, triton: FakeTriton, spans: InMemorySpanExporter, method: str
) -> None:
    triton.answer = in_turn(refuse(grpc.StatusCode.UNAVAILABLE, "full; retry in 0.01 s"), picture_answer)
    caller = trace.get_tracer("caller").start_span("caller")
    with trace.use_span(caller):
        list(answered(getattr(any_client, method)(model="one", prompt="a secret", request_id="mine/1")))
    [span] = spans.get_finished_spans()
    assert (span.name, span.kind, span.parent) == (f"{method} one", trace.SpanKind.CLIENT, caller.get_span_context())
    assert span.attributes == {"imprompt.model": "one", "imprompt.request_id": "mine/1"}
    assert [(event.name, event.attributes) for event in span.events] == [("retry", {"error": "Overloaded"})]
    assert span.status.status_code is trace.StatusCode.UNSET
    context = span.get_span_context()
    assert context is not None
    traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}"
    assert [call.metadata["traceparent"][:-3] for call in triton.calls] == [traceparent] * 2
    assert [call.id for call in triton.calls] == ["mine/1"] * 2


def answered(result: Any) -> Iterator[Any]:
    yield from result if isinstance(result, Iterator) else [result]


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_failed_request_has_the_name_of_the_error_and_its_id(
    any_client: Any, triton: FakeTriton, spans: InMemorySpanExporter, method: str
) -> None:
    triton.answer = refuse(grpc.StatusCode.INTERNAL, "a secret")
    with pytest.raises(ServerError) as failed:
        list(answered(getattr(any_client, method)(model="one", prompt="a", request_id="mine/2")))
    assert failed.value.request_id == "mine/2"
    [span] = spans.get_finished_spans()
    assert (span.status.status_code, span.status.description) == (trace.StatusCode.ERROR, "ServerError")
    assert "secret" not in span.to_json()


def test_stream_that_is_no_longer_read_is_not_an_error(
    any_client: Any, triton: FakeTriton, spans: InMemorySpanExporter
) -> None:
    events = any_client.stream(model="one", prompt="a")
    next(events)
    events.close()
    [span] = spans.get_finished_spans()
    assert span.status.status_code is trace.StatusCode.UNSET


@pytest.mark.parametrize("request_id", ["", "a b", "ä", "x" * 129, 7])
def test_ids_that_logs_and_headers_cannot_hold_are_refused(
    any_client: Any, triton: FakeTriton, request_id: Any
) -> None:
    with pytest.raises(InvalidRequest, match="request_id: must be 1 to 128 printable ASCII characters") as refused:
        any_client.generate(model="one", prompt="a", request_id=request_id)
    assert refused.value.parameter == "request_id"
    assert not triton.calls


def test_nothing_is_traced_without_opentelemetry(
    any_client: Any, triton: FakeTriton, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tracing, "trace", None)
    any_client.generate(model="one", prompt="a")
    assert "traceparent" not in triton.calls[0].metadata
