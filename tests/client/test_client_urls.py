"""Pictures that the client fetches from the web, here from a server on this machine."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fake_triton import FakeTriton, encoded

from imprompt import InvalidRequest, _download

PNG = encoded("PNG", "red")


class Pages(BaseHTTPRequestHandler):
    """Answers by path; `slow` sends a byte from time to time until the client leaves."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/redirects/"):
            left = int(path.rpartition("/")[2])
            self.answer(302, location=f"/redirects/{left - 1}" if left else "/a.png")
        elif path == "/to-a-file":
            self.answer(302, location="file:///etc/passwd")
        elif path == "/slow":
            self.answer(200, PNG[:10], length=1000)
            while not self.server.stopped.wait(0.02):  # type: ignore[attr-defined]
                self.wfile.write(b"x")
        elif path == "/large":
            self.answer(200, bytes(3000))
        elif path == "/large-without-length":
            self.answer(200, bytes(3000), length=None)
        elif path == "/cut.png":
            self.answer(200, PNG[:20], length=len(PNG))
        elif path == "/page":
            self.answer(200, b"<html>")
        elif path in ("/a.png", "/ä b.png", "/%C3%A4%20b.png"):
            self.answer(200, PNG)
        else:
            self.answer(404)

    def answer(self, status: int, body: bytes = b"", *, location: str = "", length: int | None = -1) -> None:
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(len(body) if length < 0 else length))
        if location:
            self.send_header("Location", location)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Log nothing."""


class Site(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Pages)
        self.stopped = threading.Event()

    def handle_error(self, *arguments: object) -> None:
        """Ignore clients that leave."""


@pytest.fixture
def site() -> Iterator[str]:
    server = Site()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.stopped.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("path", ["/a.png", "/a.png?signature=secret", "/ä b.png", "/redirects/4"])
def test_url_is_fetched(sent: Any, site: str, path: str) -> None:
    assert sent(image=site + path).inputs["image"].tolist() == [PNG]


def test_urls_work_wherever_pictures_do(
    connect: Callable[..., Any], triton: FakeTriton, site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # not for this machine
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    url = f"{site}/a.png"
    connect().generate(model="two", prompt="a", ip_adapter_image={"plus": [url]}, mask_image=url, video=url)
    assert [triton.calls[0].inputs[name].tolist() for name in ("ip_adapter_image", "mask_image", "video")] == [
        [PNG]
    ] * 3


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/none.png?signature=secret", "/none.png: HTTP 404 Not Found"),
        ("/redirects/9", "/redirects/9: too many redirects"),
        ("/to-a-file", "/to-a-file: HTTP 302"),
        ("/cut.png", "/cut.png: IncompleteRead"),
    ],
)
def test_failed_download(sent: Any, triton: FakeTriton, site: str, path: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        sent(image=[PNG, site + path])
    assert f"image: picture 2 of 2: cannot fetch {site.rpartition(':')[0]}" in str(caught.value)
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)
    assert not triton.calls


def test_page_is_not_a_picture(sent: Any, site: str) -> None:
    with pytest.raises(InvalidRequest, match=r"image: http://127\.0\.0\.1:\d+/page is not a PNG, JPEG"):
        sent(image=f"{site}/page?secret")


@pytest.mark.parametrize("path", ["/large", "/large-without-length"])
def test_large_files_are_refused(sent: Any, site: str, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(_download, "MAX_BYTES", 2**10)
    with pytest.raises(InvalidRequest, match=rf"{path} is larger than"):
        sent(image=site + path)


def test_slow_downloads_end(sent: Any, site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_download, "TIMEOUT_S", 0.2)
    started = time.monotonic()
    with pytest.raises(InvalidRequest, match=r"/slow: not done after 0\.2 s"):
        sent(image=f"{site}/slow")
    silent = socket.create_server(("127.0.0.1", 0))
    with silent, pytest.raises(InvalidRequest, match=r"not done after 0\.2 s"):
        sent(image=f"http://127.0.0.1:{silent.getsockname()[1]}/a.png")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://127.0.0.1:1/a.png", "cannot fetch http://127.0.0.1/a.png: Connection refused"),
        ("http://", "cannot fetch"),
        ("http://[::1/a.png", "not a valid URL"),
        ("http://127.0.0.1:port/a.png", "cannot fetch"),
        ("https://me:secret@127.0.0.1:1/a.png", "a URL must not contain a user name or password"),
        ("ftp://127.0.0.1/a.png", "no such file"),
        ("file:///etc/passwd", "no such file"),
    ],
)
def test_addresses_that_cannot_be_fetched(sent: Any, triton: FakeTriton, address: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        sent(image=address)
    assert str(caught.value).startswith(f"image: {message}")
    assert "secret" not in str(caught.value)
    assert caught.value.parameter == "image"


def test_urls_from_the_command_line(run: Any, url: str, triton: FakeTriton, site: str, folder: Path) -> None:
    arguments = ("generate", "--model", "two", "--prompt", "a", "--ip-adapter-image", f"face={site}/a.png")
    outcome = run(*arguments, "--image", f"{site}/a.png", url=url)
    assert outcome.exit_code == 0, outcome.output
    assert triton.calls[0].inputs["ip_adapter_image"].tolist() == triton.calls[0].inputs["image"].tolist() == [PNG]
