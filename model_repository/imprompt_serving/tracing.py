"""Spans of requests for OpenTelemetry, if a collector is configured and the extra `otel` is installed.

`OTEL_EXPORTER_OTLP_ENDPOINT` names the collector; OpenTelemetry's other environment variables work too. Nothing of
OpenTelemetry is imported otherwise, so model processes stay small.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

    from imprompt_serving.pipeline.record import RequestRecord

logger = logging.getLogger(__name__)

ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
HEADERS = ("traceparent", "tracestate")
"""Headers of the W3C recommendation Trace Context."""
FLUSH_S = 1.0
"""How long a model that stops waits for the collector."""
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-(?P<trace_id>[0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


class Tracer:
    """Exports a span for each request that has ended, with its stages as children, on a thread of OpenTelemetry."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider

    @classmethod
    def from_environment(cls) -> Tracer | None:
        """Return a tracer if a collector is configured."""
        if not any(os.environ.get(name) for name in ENDPOINT_VARIABLES):
            return None
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import SERVICE_NAME, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            logger.warning('no spans are exported: %s; run `pip install "imprompt[otel]"`', error)
            return None
        service = os.environ.get("OTEL_SERVICE_NAME", "imprompt")
        provider = TracerProvider(resource=Resource.create({SERVICE_NAME: service}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return cls(provider)

    def export(self, record: RequestRecord) -> str:
        """Export the span of a request that has just ended; return its trace id."""
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        epoch = time.time() - time.perf_counter()
        tracer = self._provider.get_tracer("imprompt")
        parent = TraceContextTextMapPropagator().extract(record.trace_headers)
        facts = {"request_id": record.id, "model": record.model, **record.outcome(), **record.facts}
        span = tracer.start_span(
            record.model,
            parent,
            trace.SpanKind.SERVER,
            {f"imprompt.{name}": value for name, value in facts.items() if value is not None},
            start_time=_nanoseconds(epoch + record.began),
        )
        inside = trace.set_span_in_context(span)
        for stage, began, ended in record.stages.intervals:
            child = tracer.start_span(stage, inside, start_time=_nanoseconds(epoch + began))
            child.end(_nanoseconds(epoch + ended))
        if record.error is not None:
            span.set_status(trace.StatusCode.ERROR, record.error.name)
        span.end()
        return trace.format_trace_id(span.get_span_context().trace_id)

    def close(self) -> None:
        """Export what is left, for at most a second: the collector may be away."""
        flush = threading.Thread(target=self._provider.shutdown, daemon=True)
        flush.start()
        flush.join(FLUSH_S)


def trace_id_of(record: RequestRecord) -> str | None:
    """Return the trace id of the caller; None if it sent no valid one."""
    found = _TRACEPARENT.fullmatch(record.trace_headers.get("traceparent", ""))
    return found and found["trace_id"]


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
