"""The launcher, with a real Triton and models of a few lines."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from imprompt_serving.launcher import Addresses, LaunchError, Server, install

grpc = pytest.importorskip("tritonclient.grpc", reason="needs tritonclient[grpc]")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("pytriton") is None and shutil.which("tritonserver") is None,
    reason="needs a Triton (the extra [server])",
)

CONFIG = """
backend: "python"
input [{ name: "x" data_type: TYPE_FP32 dims: [-1] }]
output [{ name: "y" data_type: TYPE_FP32 dims: [-1] }]
instance_group [{ kind: KIND_CPU }]
"""

ECHO = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        inputs = [pb_utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", x)]) for x in inputs]
"""

# A miniature pipeline: runs x steps, each a call to `echo` and a response.
STEPS = """
import asyncio
import triton_python_backend_utils as pb_utils
from imprompt_serving.drain import IN_FLIGHT_METRIC, admitted, check_drain_deadline
from imprompt_serving.errors import RequestError
from imprompt_serving.triton.tensors import raise_for_error

class TritonPythonModel:
    def initialize(self, args):
        self.family = pb_utils.MetricFamily(
            name=IN_FLIGHT_METRIC, description="requests being served", kind=pb_utils.MetricFamily.GAUGE
        )
        self.in_flight = self.family.Metric(labels={"model": args["model_name"]})

    async def execute(self, requests):
        await asyncio.gather(*map(self.answer, requests))

    async def answer(self, request):
        sender = request.get_response_sender()
        final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        try:
            with admitted(self.in_flight.increment):
                await self.run(pb_utils.get_input_tensor_by_name(request, "x"), sender)
                sender.send(flags=final)
        except RequestError as error:
            status = getattr(pb_utils.TritonError, error.status)
            sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), status)), flags=final)

    async def run(self, x, sender):
        for step in range(int(x.as_numpy()[0])):
            check_drain_deadline()
            await asyncio.sleep(0.2)
            call = pb_utils.InferenceRequest(model_name="echo", requested_output_names=["y"], inputs=[x])
            answer = await call.async_exec()
            raise_for_error(answer)
            sender.send(pb_utils.InferenceResponse(answer.output_tensors()))
"""

# Serves argv[1] with a drain timeout of argv[2] seconds, as the command does; restarts if argv[3] is "restart".
FOREGROUND = """
import sys
from imprompt_serving.launcher import LaunchError, serve

def ready(addresses):
    print("ready", addresses.grpc, addresses.metrics, addresses.health, flush=True)

try:
    sys.exit(
        serve(
            sys.argv[1],
            grpc_port=0,
            metrics_port=0,
            health_port=0,
            drain_timeout=float(sys.argv[2]),
            restart=sys.argv[3] == "restart",
            on_ready=ready,
        )
    )
except LaunchError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)
"""


def write_model(repository: Path, name: str, code: str, *, decoupled: bool = False) -> None:
    version = repository / name / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(code)
    policy = "model_transaction_policy { decoupled: true }" if decoupled else ""
    (repository / name / "config.pbtxt").write_text(CONFIG + policy)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    write_model(tmp_path / "repository", "echo", ECHO)
    write_model(tmp_path / "repository", "steps", STEPS, decoupled=True)
    return tmp_path / "repository"


def tensor(*values: float) -> Any:
    x = grpc.InferInput("x", [len(values)], "FP32")
    x.set_data_from_numpy(np.array(values, np.float32))
    return x


def echo(address: str, *values: float) -> list[float]:
    with grpc.InferenceServerClient(address) as client:
        return list(client.infer("echo", [tensor(*values)]).as_numpy("y"))


class Stream:
    """A request to `steps`, and its responses in order."""

    def __init__(self, address: str, steps: int) -> None:
        self._answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._client = grpc.InferenceServerClient(address)
        self._client.start_stream(lambda result, error: self._answers.put((result, error)))
        self._client.async_stream_infer("steps", [tensor(steps)], enable_empty_final_response=True)

    def close(self) -> None:
        self._client.close()

    def next(self) -> str:
        """Return "step", "end", or the error message."""
        result, error = self._answers.get(timeout=20)
        if error is not None:
            return str(error)
        return "end" if result.get_response().parameters["triton_final_response"].bool_param else "step"

    def rest(self) -> list[str]:
        """Return all responses up to the last one, and check that none follows."""
        answers = [self.next()]
        while answers[-1] == "step":
            answers.append(self.next())
        time.sleep(0.5)
        assert self._answers.empty()
        return answers


@dataclass
class Foreground:
    """`serve` in a separate process, with its child processes and files."""

    process: subprocess.Popen[str]
    errors: Path
    scratch: Path
    addresses: Addresses
    family: list[psutil.Process]

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        return self.process.wait(timeout=20)

    def stub(self, model: str) -> psutil.Process:
        [stub] = [p for p in self.family if any(f"/{model}/1/model.py" in argument for argument in p.cmdline())]
        return stub

    def health(self, path: str) -> tuple[int, dict[str, Any]]:
        """Return the status and the answer of a health check."""
        assert self.addresses.health is not None
        connection = HTTPConnection(self.addresses.health, timeout=10)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, json.load(response)
        finally:
            connection.close()

    def assert_nothing_left(self) -> None:
        assert not [process for process in self.family if alive(process)]
        assert not leftovers(self.process.pid)
        assert not list(self.scratch.iterdir())


def alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def leftovers(launcher_pid: int) -> list[Path]:
    """List the shared memory regions of a launcher."""
    return list(Path("/dev/shm").glob(f"imprompt_{launcher_pid}_*"))


@contextmanager
def foreground(repository: Path, *, drain_timeout: float = 20, restart: bool = False) -> Iterator[Foreground]:
    errors = repository.parent / "errors.txt"
    scratch = repository.parent / "scratch"
    scratch.mkdir()
    with errors.open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, "-c", FOREGROUND, str(repository), str(drain_timeout), "restart" if restart else "never"],
            stdout=subprocess.PIPE,
            stderr=sink,
            env=os.environ | {"TMPDIR": str(scratch)},
            text=True,
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready "), errors.read_text()
        grpc_address, metrics, health = line.split()[1:]
        family = psutil.Process(process.pid).children(recursive=True)
        assert leftovers(process.pid)  # so that their absence later proves something
        assert list(scratch.iterdir())
        yield Foreground(process, errors, scratch, Addresses(grpc=grpc_address, metrics=metrics, health=health), family)
    finally:
        process.kill()
        process.communicate()


def listening(pid: int) -> set[tuple[str, int]]:
    connections = psutil.Process(pid).net_connections("inet")
    return {tuple(connection.laddr) for connection in connections if connection.status == psutil.CONN_LISTEN}


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "did not happen in time"
        time.sleep(0.05)


@needs_triton
def test_server_uses_free_loopback_ports_and_cleans_up(
    repository: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "asyncio.py").write_text("raise ImportError('the working directory')")
    monkeypatch.chdir(tmp_path)
    before = leftovers(os.getpid())  # from servers that other tests keep running
    with Server(repository) as server:
        assert server.grpc_address.startswith("127.0.0.1:")
        assert echo(server.grpc_address, 1, 2, 3) == [1, 2, 3]
        stream = Stream(server.grpc_address, 2)
        assert stream.rest() == ["step", "step", "end"]
        assert set(server.stub_pids) == {"echo_0_0", "steps_0_0"}
        server.check()
        assert server.http_address is None
        assert len(listening(server.pid)) == 2  # gRPC and metrics
        assert set(leftovers(os.getpid())) > set(before)
        processes = [psutil.Process(pid) for pid in (server.pid, *server.stub_pids.values())]
    assert not any(alive(process) for process in processes)
    assert set(leftovers(os.getpid())) == set(before)
    output = capfd.readouterr()
    assert output.out + output.err == ""


@needs_triton
def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(repository: Path) -> None:
    with foreground(repository) as server:
        running = Stream(server.addresses.grpc, 8)
        assert running.next() == "step"
        server.signal(signal.SIGTERM)
        time.sleep(0.3)
        before = time.monotonic()
        [refusal] = Stream(server.addresses.grpc, 1).rest()
        assert "accepts no new requests" in refusal
        assert time.monotonic() - before < 1
        assert running.rest() == ["step"] * 7 + ["end"]
        assert server.wait() == 0
        server.assert_nothing_left()


@needs_triton
def test_requests_aborted_by_the_drain_timeout_get_one_error(repository: Path) -> None:
    with foreground(repository, drain_timeout=0.5) as server:
        running = Stream(server.addresses.grpc, 1000)
        assert running.next() == "step"
        server.signal(signal.SIGINT)
        *steps, last = running.rest()
        assert set(steps) == {"step"}
        assert "did not finish before the deadline" in last
        assert server.wait() == 1
        server.assert_nothing_left()


@needs_triton
def test_stopping_without_a_drain_ends_running_requests_with_a_clear_error(repository: Path) -> None:
    with Server(repository) as server:
        running = Stream(server.grpc_address, 1000)
        assert running.next() == "step"
        server.stop()
        while (last := running.next()) == "step":
            pass
    assert "the server is stopping" in last


@needs_triton
def test_second_signal_stops_everything_at_once(repository: Path) -> None:
    with foreground(repository) as server:
        running = Stream(server.addresses.grpc, 1000)
        assert running.next() == "step"
        server.signal(signal.SIGTERM)
        time.sleep(0.3)
        server.signal(signal.SIGINT)
        before = time.monotonic()
        assert server.wait() == 128 + signal.SIGINT
        assert time.monotonic() - before < 1
        server.assert_nothing_left()


@needs_triton
def test_server_exits_when_a_model_process_dies(repository: Path) -> None:
    with foreground(repository) as server:
        stub = server.stub("echo")
        stub.kill()
        assert server.wait() == 1
        message = server.errors.read_text()
        assert "echo_0_0" in message
        assert str(stub.pid) in message
        server.assert_nothing_left()


@needs_triton
def test_server_exits_when_triton_dies(repository: Path) -> None:
    with foreground(repository) as server:
        [triton] = [process for process in server.family if process.name() == "tritonserver"]
        triton.kill()
        assert server.wait() == 1
        assert "Triton stopped unexpectedly (killed by SIGKILL)" in server.errors.read_text()
        server.assert_nothing_left()


@needs_triton
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_failed_server_is_restarted_on_the_same_ports(repository: Path, number: int) -> None:
    with foreground(repository, restart=True) as server:
        assert server.health("/readyz") == (
            200,
            {"state": "serving", "restarts": 0, "last_failure": None, "bundles": {}},
        )
        before = server.family
        server.stub("echo").send_signal(number)
        wait_for(lambda: server.health("/readyz")[1]["restarts"] == 1)
        assert server.health("/livez")[0] == 200
        wait_for(lambda: server.health("/readyz")[0] == 200, 120)
        assert echo(server.addresses.grpc, 4) == [4]
        assert not any(alive(process) for process in before)
        assert "echo_0_0" in server.health("/readyz")[1]["last_failure"]
        assert "restarting in 1 s" in server.errors.read_text()
        server.family = psutil.Process(server.process.pid).children(recursive=True)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        server.assert_nothing_left()


@needs_triton
def test_server_that_fails_to_restart_is_restarted_once_it_can_be(repository: Path) -> None:
    with foreground(repository, restart=True) as server:
        code = (repository / "echo/1/model.py").read_text()
        (repository / "echo/1/model.py").write_text("raise ValueError('broken')")
        server.stub("echo").kill()
        wait_for(lambda: server.health("/livez")[1]["restarts"] == 2, 60)
        assert server.health("/readyz")[0] == 503
        assert "model 'echo' failed to load: ValueError: broken" in server.health("/livez")[1]["last_failure"]
        (repository / "echo/1/model.py").write_text(code)
        wait_for(lambda: server.health("/readyz")[0] == 200, 120)
        assert echo(server.addresses.grpc, 4) == [4]


@needs_triton
def test_signal_ends_a_server_that_waits_for_its_restart(repository: Path) -> None:
    with foreground(repository, restart=True) as server:
        (repository / "echo/1/model.py").write_text("raise ValueError('broken')")
        server.stub("echo").kill()
        wait_for(lambda: server.health("/livez")[1]["restarts"] >= 2, 60)
        server.signal(signal.SIGTERM)
        assert server.wait() == 128 + signal.SIGTERM
        server.assert_nothing_left()


@needs_triton
def test_killed_launcher_leaves_nothing_behind(repository: Path) -> None:
    with foreground(repository) as server:
        server.signal(signal.SIGKILL)
        server.wait()
        wait_for(lambda: not any(alive(process) for process in server.family))
        server.assert_nothing_left()


@needs_triton
def test_signal_before_ready_aborts_the_start(tmp_path: Path) -> None:
    write_model(tmp_path / "repository", "slow", "import time\n\ntime.sleep(60)\n" + ECHO)
    process = subprocess.Popen([sys.executable, "-c", FOREGROUND, str(tmp_path / "repository"), "1", "never"])
    wait_for(lambda: bool(leftovers(process.pid)))
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 128 + signal.SIGTERM
    assert not leftovers(process.pid)


@needs_triton
def test_error_names_a_model_that_does_not_load_with_its_traceback(repository: Path) -> None:
    write_model(
        repository, "broken", ECHO + "    def initialize(self, args):\n        raise ValueError('no such engine')\n"
    )
    before = leftovers(os.getpid())
    with pytest.raises(LaunchError) as error, Server(repository):
        pass
    assert str(error.value).splitlines()[0] == "model 'broken' failed to load: ValueError: no such engine"
    assert "broken/1/model.py(" in str(error.value)
    assert set(leftovers(os.getpid())) == set(before)


@needs_triton
def test_start_timeout_is_an_error(tmp_path: Path) -> None:
    write_model(tmp_path / "repository", "slow", "import time\n\ntime.sleep(60)\n" + ECHO)
    before = leftovers(os.getpid())
    with pytest.raises(LaunchError, match=r"not ready after 1 s"), Server(tmp_path / "repository", start_timeout=1):
        pass
    assert set(leftovers(os.getpid())) == set(before)


@needs_triton
@pytest.mark.parametrize("name", ["grpc", "http", "metrics"])
def test_error_names_a_port_in_use(repository: Path, name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ports: dict[str, Any] = {f"{name}_port": port}
        with pytest.raises(LaunchError, match=rf"127\.0\.0\.1:{port} \(the {name} port\): Address already in use"):
            Server(repository, **ports).start()


def test_missing_or_empty_repository_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="no such folder"):
        Server(tmp_path / "nowhere")
    with pytest.raises(LaunchError, match=r"config\.pbtxt"):
        Server(tmp_path)


@pytest.fixture
def no_triton_on_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.usefixtures("no_triton_on_path")
def test_missing_triton_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LaunchError, match=r"imprompt\[server\]"):
        install.find_triton()


@needs_triton
@pytest.mark.usefixtures("no_triton_on_path")
def test_numpy_2_is_refused_with_the_pip_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "2.1.0")
    with pytest.raises(LaunchError, match=r"numpy 2\.1\.0 .* needs numpy < 2"):
        install.find_triton()


@needs_triton
@pytest.mark.usefixtures("no_triton_on_path")
def test_python_without_a_stub_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "PYTHON", "3.99")
    with pytest.raises(LaunchError, match=r"no Python stub for Python 3\.99 \(it has 3\.8, .*3\.11"):
        install.find_triton()


@needs_triton
@pytest.mark.usefixtures("no_triton_on_path")
def test_python_without_a_shared_library_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: str(tmp_path) if name == "LIBDIR" else "")
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    with pytest.raises(LaunchError, match="has no shared libpython"):
        install.find_triton()


def test_triton_on_path_for_another_python_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stub = tmp_path / "backends" / "python" / "triton_python_backend_stub"
    stub.parent.mkdir(parents=True)
    stub.write_bytes(b"... libpython3.4.so.1.0 ...")
    binary = tmp_path / "bin" / "tritonserver"
    binary.parent.mkdir()
    binary.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(binary.parent))
    with pytest.raises(LaunchError, match="no Python stub for Python 3"):
        install.find_triton()
