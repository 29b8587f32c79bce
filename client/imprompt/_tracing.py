"""Spans of requests, if the application uses OpenTelemetry; the server continues their trace.

Without the package `opentelemetry-api`, or without an application that configures it, this does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from imprompt._connection import Metadata
from imprompt._request import Request

if TYPE_CHECKING:
    from opentelemetry import trace
else:
    try:
        from opentelemetry import trace
    except ImportError:
        trace = None


class CallSpan:
    """The span of one request, over all attempts."""

    def __init__(self, span: trace.Span | None = None) -> None:
        self._span = span
        self.headers: Metadata = () if span is None else _trace_headers(span)
        """Metadata that makes the server's span a child of this one."""

    def retry(self, failure: Exception) -> None:
        """Record that the request is sent again."""
        if self._span is not None:
            self._span.add_event("retry", {"error": type(failure).__name__})


@contextmanager
def call_span(operation: str, request: Request) -> Iterator[CallSpan]:
    """Open a span for a request. It does not become the current one, because a stream may be read in other contexts."""
    if trace is None:
        yield CallSpan()
        return
    attributes = {"imprompt.model": request.bundle, "imprompt.request_id": request.id}
    tracer = trace.get_tracer("imprompt")
    span = tracer.start_span(f"{operation} {request.bundle}", kind=trace.SpanKind.CLIENT, attributes=attributes)
    try:
        yield CallSpan(span)
    except GeneratorExit:  # the caller no longer reads a stream
        raise
    except BaseException as error:
        span.set_status(trace.StatusCode.ERROR, type(error).__name__)
        raise
    finally:
        span.end()


def _trace_headers(span: trace.Span) -> Metadata:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    headers: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(headers, trace.set_span_in_context(span))
    return tuple(headers.items())
