"""An OpenTelemetry collector: receives spans over HTTP, in protobuf as Python sends them or in JSON as Triton does."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PROTOBUF = "application/x-protobuf"


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A span that was received; ids are hexadecimal, and times in nanoseconds since the epoch."""

    name: str
    trace_id: str
    id: str
    parent_id: str
    service: str
    began: int
    ended: int
    attributes: dict[str, Any]


@dataclass
class Collector:
    """The spans that were received so far."""

    url: str = ""
    spans: list[Span] = field(default_factory=list)

    def wait_for(self, condition: Callable[[Span], bool], seconds: float = 30.0) -> Span:
        """Wait for a span."""
        until = time.monotonic() + seconds
        while not (found := [span for span in list(self.spans) if condition(span)]):
            assert time.monotonic() < until, [span.name for span in self.spans]
            time.sleep(0.05)
        return found[0]

    def children(self, parent: Span) -> list[Span]:
        return [span for span in list(self.spans) if span.parent_id == parent.id]


@contextmanager
def collecting() -> Iterator[Collector]:
    """Run a collector on a free port."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            collector.spans += _from_protobuf(body) if self.headers["Content-Type"] == PROTOBUF else _from_json(body)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield collector
        server.shutdown()


def _from_protobuf(body: bytes) -> Iterator[Span]:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
        service = next(one.value.string_value for one in resource.resource.attributes if one.key == "service.name")
        for span in (span for scope in resource.scope_spans for span in scope.spans):
            yield Span(
                name=span.name,
                trace_id=span.trace_id.hex(),
                id=span.span_id.hex(),
                parent_id=span.parent_span_id.hex(),
                service=service,
                began=span.start_time_unix_nano,
                ended=span.end_time_unix_nano,
                attributes={one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes},
            )


def _from_json(body: bytes) -> Iterator[Span]:
    for resource in json.loads(body)["resourceSpans"]:
        attributes = {one["key"]: one["value"].get("stringValue") for one in resource["resource"]["attributes"]}
        for span in (span for scope in resource["scopeSpans"] for span in scope["spans"]):
            yield Span(
                name=span["name"],
                trace_id=span["traceId"],
                id=span["spanId"],
                parent_id=span.get("parentSpanId", ""),
                service=attributes["service.name"],
                began=int(span["startTimeUnixNano"]),
                ended=int(span["endTimeUnixNano"]),
                attributes={one["key"]: next(iter(one["value"].values())) for one in span.get("attributes", [])},
            )
