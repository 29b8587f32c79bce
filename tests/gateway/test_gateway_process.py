"""The gateway as a process: beside `imprompt serve`, and what it says when it cannot start."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

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
