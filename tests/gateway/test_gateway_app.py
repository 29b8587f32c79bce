"""What the gateway does without a server behind it: keys, limits, errors, health, metrics, and its pages."""

from __future__ import annotations

import asyncio
import hmac
import re
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from imprompt import (
    AsyncClient,
    Cancelled,
    ConnectionFailed,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    ServerError,
)
from imprompt_gateway import auth, bodies
from imprompt_gateway.app import MAX_BODY_BYTES, ROUTES, create_app
from imprompt_gateway.errors import UnknownModel, failure
from imprompt_gateway.limits import BODY_TIMEOUT_S, LimitBody
from imprompt_gateway.openapi import document
from imprompt_gateway.parameters import KNOWN
from imprompt_gateway.pictures import MAX_MASK_PIXELS

NO_SERVER = "127.0.0.1:1"
GENERATIONS = "/v1/images/generations"
FLOWER = {"model": "world", "prompt": "a flower"}


def client(**options: Any) -> TestClient:
    return TestClient(create_app(AsyncClient(NO_SERVER, max_retries=0), **options))


@pytest.fixture
def http() -> Iterator[TestClient]:
    with client() as opened:
        yield opened


@pytest.fixture
def guarded() -> Iterator[TestClient]:
    with client(keys=("first", "second")) as opened:
        yield opened


ERRORS: list[tuple[Exception, int, str, str | None, str | None]] = [
    (InvalidRequest("eta: x", parameter="eta"), 400, "invalid_value", "eta", None),
    (UnknownModel("model: x", parameter="model"), 404, "model_not_found", "model", None),
    (Overloaded("full; retry in 2.3 s", retry_after=2.3), 429, "queue_full", None, "3"),
    (Overloaded("full; retry in 0 s", retry_after=0.0), 429, "queue_full", None, "1"),
    (Overloaded("the server is stopping"), 503, "unavailable", None, "5"),
    (Cancelled("the server is stopping"), 503, "unavailable", None, "5"),
    (ConnectionFailed("10.0.0.1:8001: refused"), 503, "unavailable", None, "5"),
    (DeadlineExceeded("timeout: 1 s"), 504, "deadline_exceeded", "timeout", None),
    (ServerError("secret", request_id="abc"), 500, "internal_error", None, None),
    (KeyError("secret"), 500, "internal_error", None, None),
    (HTTPException(413, "large"), 413, "request_too_large", None, None),
]


@pytest.mark.parametrize(
    ("error", "status", "code", "param", "retry_after"),
    ERRORS,
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_errors_have_openais_form(
    error: Exception, status: int, code: str, param: str | None, retry_after: str | None
) -> None:
    described = failure(error)
    body = described.body()["error"]
    assert (described.status, body["code"], body["param"]) == (status, code, param)
    assert described.headers.get("Retry-After") == retry_after
    assert body.keys() == {"message", "type", "param", "code"}
    assert "secret" not in body["message"]
    assert "10.0.0.1" not in body["message"]


def test_page_lists_errors_and_limits() -> None:
    page = (Path(__file__).parents[2] / "docs/gateway.md").read_text(encoding="utf-8")
    for _, status, code, _, _ in ERRORS:
        assert f"| {status} | `{code}` |" in page
    assert f"{MAX_BODY_BYTES // 2**20} MiB, counted" in page
    assert BODY_TIMEOUT_S == 120
    assert "two minutes" in page
    assert f"{bodies.MAX_DEPTH} levels deep, {bodies.MAX_CONTAINERS:,} lists and objects" in page
    assert f"{bodies.MAX_VALUES:,} values" in page
    assert f"{bodies.MAX_FORM_PARTS:,} files" in page
    assert f"{MAX_MASK_PIXELS / 1e6:.1f} million pixels" in page


def test_server_errors_name_the_request_in_the_servers_log() -> None:
    assert "abc" in failure(ServerError("x", request_id="abc")).message


def test_server_that_cannot_be_reached_is_unavailable(http: TestClient) -> None:
    answer = http.post(GENERATIONS, json=FLOWER)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "5"
    assert answer.json()["error"]["code"] == "unavailable"
    assert NO_SERVER not in answer.text


def test_health_of_gateway_and_server_differ(http: TestClient) -> None:
    assert http.get("/livez").status_code == 200
    answer = http.get("/readyz")
    assert (answer.status_code, answer.json()) == (503, {"ready": False})


@pytest.mark.parametrize("status", [200, 503])
def test_readiness_is_what_the_health_port_says(status: int) -> None:
    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/readyz" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Health) as health:
        threading.Thread(target=health.handle_request).start()
        with client(health_url=f"http://127.0.0.1:{health.server_port}/readyz") as http:
            assert http.get("/readyz").status_code == status


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nope", 404),
        ("POST", "/v1/nope", 404),
        ("GET", GENERATIONS, 405),
        ("GET", "/nope", 404),
        ("GET", "/playground/nope.js", 404),
        ("GET", "/playground/../app.py", 404),
    ],
)
def test_unknown_routes_have_errors_in_openais_form(http: TestClient, method: str, path: str, status: int) -> None:
    answer = http.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"content": b"{}"}, 415),
        ({"data": {"model": "world"}}, 415),
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=b"}}, 400),
        ({"content": b'{"\\ud800": 1}', "headers": {"content-type": "application/json"}}, 400),
    ],
)
def test_bodies_that_cannot_be_read(http: TestClient, options: dict[str, Any], status: int) -> None:
    answer = http.post(GENERATIONS, **options)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("key", ["first", "second"])
def test_any_of_the_keys_opens_the_api(guarded: TestClient, key: str) -> None:
    assert guarded.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 503
    assert guarded.get("/v1/models", headers={"Authorization": f"bearer  {key}"}).status_code == 503


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Bearer firs", "Bearer first second", "Basic first"])
@pytest.mark.parametrize("path", ["/v1/models", GENERATIONS, "/v1/nope"])
def test_other_callers_are_refused(guarded: TestClient, header: str | None, path: str) -> None:
    answer = guarded.post(path, json=FLOWER, headers={} if header is None else {"Authorization": header})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("path", ["/", "/docs", "/docs.css", "/openapi.json", "/livez", "/metrics"])
def test_pages_and_probes_need_no_key(guarded: TestClient, path: str) -> None:
    assert guarded.get(path).status_code == 200


def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch, guarded: TestClient) -> None:
    """The time that a check takes must not tell which key is close."""
    compared = []
    compare = hmac.compare_digest

    def watched(given: bytes, key: bytes) -> bool:
        compared.append(key)
        return compare(given, key)

    monkeypatch.setattr(hmac, "compare_digest", watched)
    assert guarded.get("/v1/models", headers={"Authorization": "Bearer first"}).status_code == 503
    assert len({*compared}) == 2


@pytest.mark.parametrize("text", ["", "\n# a comment\n\n"])
def test_key_file_without_keys_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ValueError, match="no keys"):
        auth.read_keys(file)


def test_keys_are_the_lines_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# team a\n first \n\nsecond#1\r\n")
    assert auth.read_keys(file) == ("first", "second#1")


def test_pages_of_other_sites_cannot_use_a_gateway_without_keys(http: TestClient, guarded: TestClient) -> None:
    foreign = {"Sec-Fetch-Site": "cross-site"}
    assert http.post(GENERATIONS, json=FLOWER, headers=foreign).status_code == 403
    assert http.post(GENERATIONS, json=FLOWER, headers={"Sec-Fetch-Site": "same-origin"}).status_code == 503
    assert guarded.get("/v1/models", headers=foreign | {"Authorization": "Bearer first"}).status_code == 503


def chunks(count: int) -> Iterator[bytes]:
    for _ in range(count):
        yield b" " * 100


@pytest.mark.parametrize("content", [b" " * 1001, chunks(20)], ids=["declared", "chunked"])
def test_large_bodies_are_refused(content: Any) -> None:
    with client(max_bytes=1000) as http:
        answer = http.post(GENERATIONS, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"
    assert answer.headers["connection"] == "close"


def test_bodies_up_to_the_limit_are_read() -> None:
    body = b'{"model": "world"}'
    with client(max_bytes=len(body)) as http:
        answer = http.post(GENERATIONS, content=body, headers={"content-type": "application/json"})
    assert answer.json()["error"]["param"] == "prompt"


def run_body(messages: list[Message], *, max_bytes: int = 100, headers: tuple[tuple[bytes, bytes], ...] = ()) -> int:
    """Send `messages` and then nothing more; return how many of them the application received before the error."""
    received = 0

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["type"] == "http.request":
            pass

    async def receive() -> Message:
        nonlocal received
        if received == len(messages):
            await asyncio.Event().wait()
        received += 1
        return messages[received - 1]

    async def send(message: Message) -> None:
        raise AssertionError(message)

    limited = LimitBody(application, max_bytes=max_bytes, timeout=0.05)
    with pytest.raises(HTTPException) as caught:
        asyncio.run(limited({"type": "http", "headers": headers}, receive, send))
    return caught.value.status_code * 10 + received


def part(size: int) -> Message:
    return {"type": "http.request", "body": b" " * size, "more_body": True}


def test_body_is_counted_while_it_arrives() -> None:
    assert run_body([part(60)] * 10) == 4132  # the second part exceeds the limit


def test_body_that_is_too_large_by_its_own_account_is_not_read() -> None:
    assert run_body([part(60)], headers=((b"content-length", b"101"),)) == 4130


def test_body_that_stops_arriving_times_out() -> None:
    assert run_body([part(1)]) == 4081


def test_metrics_count_routes_and_statuses(http: TestClient) -> None:
    http.get("/livez")
    http.get("/livez")
    http.get("/v1/models/a")
    http.get("/v1/models/b")
    http.get("/no/such/route")
    text = http.get("/metrics").text
    assert 'imprompt_gateway_requests_total{route="/livez",status="200"} 2' in text
    assert 'imprompt_gateway_requests_total{route="/v1/models/{name}",status="503"} 2' in text
    assert 'imprompt_gateway_requests_total{route="other",status="404"} 1' in text
    assert 'imprompt_gateway_request_seconds_bucket{route="/livez",le="+Inf"} 2' in text
    assert 'imprompt_gateway_request_seconds_count{route="/livez"} 2' in text
    assert "imprompt_gateway_requests_in_flight 1" in text
    assert "/no/such/route" not in text


def test_metrics_count_requests_that_fail() -> None:
    def broken(request: Request) -> PlainTextResponse:
        raise KeyError

    app = create_app(AsyncClient(NO_SERVER))
    app.routes.append(Route("/broken", broken))
    with TestClient(app, raise_server_exceptions=False) as http:
        answer = http.get("/broken")
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "internal_error"
        text = http.get("/metrics").text
    assert 'imprompt_gateway_requests_total{route="/broken",status="500"} 1' in text
    assert "imprompt_gateway_requests_in_flight 1" in text


def test_pages_load_nothing_from_elsewhere(http: TestClient) -> None:
    for path in ("/", "/docs"):
        answer = http.get(path)
        assert answer.headers["content-type"].startswith("text/html")
        assert answer.headers["content-security-policy"].startswith("default-src 'self'")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not re.findall(r"(?:src|href)=[\"'](?:https?:)?//", answer.text)
        assert "<script>" not in answer.text
        assert "style=" not in answer.text


class _Balanced(HTMLParser):
    """Checks that every element of a page is closed."""

    VOID = ("meta", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_docs_page_lists_every_parameter_and_route(http: TestClient) -> None:
    text = http.get("/docs").text
    page = _Balanced()
    page.feed(text)
    assert page.open == []
    for name in (*KNOWN, *document()["paths"]):
        assert name in text
    assert "{&#x27;up&#x27;:" in text  # from the documentation of ip_adapter_scale


def references(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        yield from ([value["$ref"]] if isinstance(value.get("$ref"), str) else [])
        for item in value.values():
            yield from references(item)
    elif isinstance(value, list):
        for item in value:
            yield from references(item)


def test_openapi_describes_every_route(http: TestClient) -> None:
    described = http.get("/openapi.json").json()
    pages = {"/", "/docs", "/docs.css", "/openapi.json"}
    routes = {route.path: route for route in ROUTES if isinstance(route, Route) and route.path not in pages}
    assert described["paths"].keys() == routes.keys()
    for route in routes.values():
        assert {method.upper() for method in described["paths"][route.path]} == (route.methods or set()) - {"HEAD"}
    for reference in references(described):
        assert reference.removeprefix("#/components/schemas/") in described["components"]["schemas"]
    assert described["components"]["schemas"]["ImageRequest"]["properties"].keys() == KNOWN.keys()
