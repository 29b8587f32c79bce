"""The gateway as a process: beside `imprompt serve`, and what it says when it cannot start."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import typer

from imprompt.cli import gateway_process

IMPROMPT = [sys.executable, "-m", "imprompt"]
CONFIG = """
backend: "python"
input [{ name: "x" data_type: TYPE_FP32 dims: [-1] }]
output [{ name: "y" data_type: TYPE_FP32 dims: [-1] }]
instance_group [{ kind: KIND_CPU }]
"""
MODEL = """
class TritonPythonModel:
    def execute(self, requests):
        return []
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with a model of a few lines, which loads quickly."""
    version = tmp_path / "repository/model/1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(MODEL)
    (version.parent / "config.pbtxt").write_text(CONFIG)
    return tmp_path / "repository"


def status_of(url: str) -> int | None:
    """Return the status of a GET, or None if nobody answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        return int(opener.open(url, timeout=10).status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_gateway_of_a_server_ends_with_it(repository: Path, number: signal.Signals) -> None:
    ports = ("--grpc-port", "0", "--metrics-port", "0", "--gateway-port", "0")
    server = subprocess.Popen([*IMPROMPT, "serve", str(repository), *ports], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        gateway = re.search(r"gateway=(http://127\.0\.0\.1:\d+)$", line.strip())
        assert gateway is not None
        assert line.startswith("ready grpc=")
        assert status_of(f"{gateway[1]}/readyz") == 200
        server.send_signal(number)
        status = server.wait(60)
    finally:
        server.kill()
    assert status == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    deadline = time.monotonic() + 30
    while status_of(f"{gateway[1]}/livez") is not None:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextmanager
def serving(repository: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Serve with a gateway; yield the process, and the gateway's address."""
    ports = ("--grpc-port", "0", "--metrics-port", "0", "--gateway-port", "0")
    server = subprocess.Popen(
        [*IMPROMPT, "serve", str(repository), *ports, *options], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        yield server, server.stdout.readline().strip().partition(" gateway=")[2]
    finally:
        server.kill()
        server.wait()


def gateway_of(server: subprocess.Popen[str]) -> psutil.Process:
    [gateway] = [child for child in psutil.Process(server.pid).children() if "gateway" in child.cmdline()]
    return gateway


def test_gateway_that_dies_is_restarted_at_its_address(repository: Path) -> None:
    with serving(repository) as (server, address):
        killed = gateway_of(server)
        killed.kill()
        killed.wait(10)
        deadline = time.monotonic() + 60
        while status_of(f"{address}/readyz") != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert gateway_of(server) != killed
        server.terminate()
        assert server.wait(60) == 0
        assert status_of(f"{address}/livez") is None


def test_gateway_that_hangs_when_it_starts_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = tmp_path / "python"
    hanging.write_text("#!/bin/sh\nexec sleep 60\n")
    hanging.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(hanging))
    monkeypatch.setattr(gateway_process, "_START_S", 0.2)
    before, began = psutil.Process().children(), time.monotonic()
    with pytest.raises(typer.Exit):
        gateway_process.Gateway("h:1", "h:2", host="127.0.0.1", port=0, next_pause=None)
    assert time.monotonic() - began < 10
    assert psutil.Process().children() == before


def test_server_whose_gateway_must_not_be_restarted_ends_with_it(repository: Path) -> None:
    with serving(repository, "--restart", "never") as (server, _):
        gateway_of(server).kill()
        assert server.wait(60) == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1:0"),
        (["--url", "http://localhost:8001"], "without http://"),
        (["--api-key-file", "/nonexistent/keys"], "No such file"),
        (["--api-key-file", "/dev/null"], "no keys"),
    ],
)
def test_gateway_that_cannot_start_says_why(options: list[str], expected: str) -> None:
    done = subprocess.run([*IMPROMPT, "gateway", "--port", "0", *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert expected in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
