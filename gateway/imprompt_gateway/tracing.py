"""Spans of HTTP requests for OpenTelemetry, if a collector is configured and the extra `otel` is installed.

`OTEL_EXPORTER_OTLP_ENDPOINT` names the collector; OpenTelemetry's other environment variables work too.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.types import Scope

if TYPE_CHECKING:
    from opentelemetry import trace
else:
    try:
        from opentelemetry import trace
    except ImportError:
        trace = None

log = logging.getLogger("imprompt.gateway")

ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def export_spans() -> None:
    """Export the spans of this process, those of the SDK included, if a collector is configured."""
    if not any(os.environ.get(name) for name in ENDPOINT_VARIABLES):
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        log.warning('no spans are exported: %s; run `pip install "imprompt[otel]"`', error)
        return
    service = os.environ.get("OTEL_SERVICE_NAME", "imprompt-gateway")
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: service}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


class ServerSpan:
    """The span of one HTTP request; without OpenTelemetry, nothing."""

    def __init__(self, scope: Scope, span: trace.Span | None = None) -> None:
        self._scope, self._span = scope, span

    @property
    def trace_id(self) -> str | None:
        """The id of its trace, if it has one."""
        context = None if self._span is None else self._span.get_span_context()
        return trace.format_trace_id(context.trace_id) if context is not None and context.is_valid else None

    def ended(self, status: int) -> None:
        """Record the status of the answer, and the route, which is known by now."""
        if self._span is None:
            return
        route = getattr(self._scope.get("route"), "path", "")
        self._span.update_name(f"{self._scope['method']} {route}".strip())
        self._span.set_attributes({"http.response.status_code": status, "http.route": route})
        if status >= 500:
            self._span.set_status(trace.StatusCode.ERROR)


@contextmanager
def server_span(scope: Scope, request_id: str) -> Iterator[ServerSpan]:
    """Open the span of an HTTP request, as a child of the caller's; those of the SDK become its children."""
    if trace is None:
        yield ServerSpan(scope)
        return
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    parent = TraceContextTextMapPropagator().extract(dict(Headers(scope=scope)))
    attributes = {"http.request.method": scope["method"], "imprompt.request_id": request_id}
    with trace.get_tracer("imprompt.gateway").start_as_current_span(
        scope["method"],
        parent,
        trace.SpanKind.SERVER,
        attributes,
        record_exception=False,  # its message may quote the request
        set_status_on_exception=False,
    ) as span:
        yield ServerSpan(scope, span)
