"""Starts the Triton that is there, says when it is ready, drains it, and leaves nothing behind.

`serve` is the foreground command (`imprompt serve REPO`); `Server` is the same as a context manager, for tests and the demo.
Which Triton, and what it needs around it, is `_triton_install`; what "drain" means to a model is `drain`.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self, TextIO

import psutil

from imprompt_serving._triton_install import LaunchError, TritonInstall, find_triton
from imprompt_serving.drain import DRAIN_FILE_VARIABLE, IN_FLIGHT_METRIC, announce_drain

__all__ = ["Addresses", "LaunchError", "Server", "serve"]

# Triton's own wait for running requests after SIGTERM. Short: the drain has happened before, and in this phase Triton
# refuses the BLS calls of whatever still runs, so that waiting longer saves nothing.
EXIT_TIMEOUT_S = 3
RESPONSE_CACHE_BYTES = 256 * 2**20
POLL_S = 0.1
LOG_TAIL_LINES = 400
SHARED_MEMORY = Path("/dev/shm")

# Said by Triton at every start on a machine without a GPU; as warnings they would only teach people to ignore warnings.
HARMLESS_WITHOUT_GPU = re.compile(
    r"Unable to allocate pinned system memory|CudaDriverHelper has not been initialized|DCGM unable to start"
    r"|Error: Failed to initialize NVML"
)
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, kw_only=True, slots=True)
class Addresses:
    """Where a running server listens, each as `host:port`."""

    grpc: str
    http: str
    metrics: str


class Server:
    """One Triton over one model repository: `with Server(repository) as server: Client(server.grpc_address)`.

    A port 0 means any free one. Log lines of Triton and of the models go to `log` (default: stderr), warnings and errors
    only unless `verbose`; before the server is ready they are kept back, and become part of the error if it fails.

    The thread that starts the server must live as long as the server: Linux ends the child when that thread ends.
    """

    def __init__(
        self,
        repository: str | os.PathLike[str],
        *,
        grpc_port: int = 0,
        http_port: int = 0,
        metrics_port: int = 0,
        host: str = "127.0.0.1",
        start_timeout: float = 900.0,
        verbose: bool = False,
        log: TextIO | None = None,
    ) -> None:
        self.repository = _checked_repository(Path(repository))
        self._ports = {"gRPC": grpc_port, "HTTP": http_port, "metrics": metrics_port}
        self._host = host
        self._start_timeout = start_timeout
        self._verbose = verbose
        self._shm_prefix = f"imprompt_{os.getpid()}_{secrets.token_hex(3)}_"
        self._log = _Log(log or sys.stderr)
        self._process: subprocess.Popen[str] | None = None
        self._stubs: list[psutil.Process] = []
        self._stub_models: dict[int, str] = {}
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._addresses: Addresses | None = None

    @property
    def addresses(self) -> Addresses:
        if self._addresses is None:
            raise LaunchError("the server has not been started")
        return self._addresses

    @property
    def grpc_address(self) -> str:
        return self.addresses.grpc

    @property
    def http_address(self) -> str:
        return self.addresses.http

    @property
    def metrics_address(self) -> str:
        return self.addresses.metrics

    @property
    def pid(self) -> int:
        """The process id of `tritonserver`."""
        return self._running.pid

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, *, cancelled: Callable[[], bool] = lambda: False) -> None:
        """Returns when all models are ready. Raises `LaunchError`, with nothing left running, when that does not happen.

        `cancelled` is asked while waiting; when it says yes, the start is given up and the server is not ready.
        """
        triton = find_triton()
        ports = _free_ports(self._host, self._ports)
        self._scratch = tempfile.TemporaryDirectory(prefix="imprompt-")
        try:
            self._spawn(triton, Path(self._scratch.name), ports)
            self._wait_until_ready(cancelled)
        except BaseException:
            self.kill()
            raise

    def check(self) -> None:
        """Raises `LaunchError` when Triton has ended, or the process of a model has: Triton does not restart those."""
        status = self._running.poll()
        if status is not None:
            raise LaunchError(f"Triton ended by itself ({_describe_status(status)})\n{self._log.relevant()}")
        for stub in self._stubs:
            if not _alive(stub):
                model = self._stub_models[stub.pid]
                raise LaunchError(
                    f"the process of model {model!r} (pid {stub.pid}) has ended; Triton does not start it again, "
                    f"and every call of this model would fail\n{self._log.relevant()}"
                )

    def drain(self, timeout: float, *, hurry: Callable[[], bool] = lambda: False) -> bool:
        """Tells the models to take no new requests, and waits for the running ones. True: none is left.

        After `timeout` seconds the models end what still runs by themselves (see `drain`); that is given some more seconds.
        """
        announce_drain(self._drain_file, deadline=time.time() + timeout)
        until = time.monotonic() + timeout + EXIT_TIMEOUT_S
        while time.monotonic() < until and not hurry():
            self.check()
            if self._in_flight() == 0:
                return True
            time.sleep(POLL_S)
        return False

    def stop(self) -> None:
        """Ends Triton (SIGTERM, then by force) and removes what it left. Harmless when nothing runs."""
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=EXIT_TIMEOUT_S + 10)
            except subprocess.TimeoutExpired:
                self._log.write(f"imprompt: Triton did not end within {EXIT_TIMEOUT_S + 10} s of SIGTERM; killing it\n")
        self.kill()

    def kill(self) -> None:
        """Ends Triton and its children at once and removes what they left."""
        if self._process is not None:
            _kill_group(self._process.pid)
            self._process.wait()
            self._log.join()
        for region in SHARED_MEMORY.glob(f"{self._shm_prefix}*"):
            region.unlink(missing_ok=True)
        if self._scratch is not None:
            self._scratch.cleanup()
        self._process = None
        self._scratch = None
        self._addresses = None
        self._stubs = []

    @property
    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            raise LaunchError("the server is not running")
        return self._process

    @property
    def _drain_file(self) -> Path:
        assert self._scratch is not None
        return Path(self._scratch.name) / "drain"

    def _spawn(self, triton: TritonInstall, scratch: Path, ports: dict[str, int]) -> None:
        arguments = [
            str(triton.binary),
            f"--model-repository={self.repository}",
            "--model-control-mode=none",
            "--disable-auto-complete-config",
            f"--backend-directory={triton.prepare_backends(scratch)}",
            f"--cache-directory={triton.caches}",
            f"--cache-config=local,size={RESPONSE_CACHE_BYTES}",
            f"--backend-config=python,shm-region-prefix-name={self._shm_prefix}",
            f"--grpc-address={self._host}",
            f"--http-address={self._host}",
            f"--metrics-address={self._host}",
            f"--grpc-port={ports['gRPC']}",
            f"--http-port={ports['HTTP']}",
            f"--metrics-port={ports['metrics']}",
            f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
            f"--log-info={'true' if self._verbose else 'false'}",
        ]
        environment = triton.environment() | {DRAIN_FILE_VARIABLE: str(self._drain_file), "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(
            arguments,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=0,  # Ctrl-C in the terminal reaches the launcher only, which drains; and all stubs end as a group
            preexec_fn=_end_with_parent,
        )
        self._log.follow(self._process, harmless=None if self._verbose else HARMLESS_WITHOUT_GPU)
        reach = "127.0.0.1" if self._host == "0.0.0.0" else self._host
        self._addresses = Addresses(
            grpc=f"{reach}:{ports['gRPC']}", http=f"{reach}:{ports['HTTP']}", metrics=f"{reach}:{ports['metrics']}"
        )

    def _wait_until_ready(self, cancelled: Callable[[], bool]) -> None:
        until = time.monotonic() + self._start_timeout
        while not _is_ready(self.addresses.http):
            status = self._running.poll()
            if status is not None:
                self._log.join()
                raise LaunchError(f"Triton did not start ({_describe_status(status)})\n{self._log.relevant()}")
            if time.monotonic() > until:
                raise LaunchError(f"Triton is not ready after {self._start_timeout:g} s\n{self._log.relevant()}")
            if cancelled():
                return
            time.sleep(POLL_S)
        self._stubs = psutil.Process(self._running.pid).children(recursive=True)
        self._stub_models = {stub.pid: _model_of(stub) for stub in self._stubs}
        self._log.release()

    def _in_flight(self) -> int:
        """Requests that the models say they are working on (the gauge of `drain`)."""
        with urllib.request.urlopen(f"http://{self.addresses.metrics}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        return sum(int(float(line.rsplit(" ", 1)[1])) for line in lines if line.startswith(IN_FLIGHT_METRIC))


def serve(
    repository: str | os.PathLike[str],
    *,
    grpc_port: int = 8001,
    http_port: int = 8000,
    metrics_port: int = 8002,
    host: str = "127.0.0.1",
    on_ready: Callable[[Addresses], None],
    drain_timeout: float = 30.0,
    verbose: bool = False,
) -> int:
    """Serves until SIGINT or SIGTERM, then drains; a second signal ends everything at once. Main thread only.

    Returns the exit status: 0 when every request had ended, 1 when the drain timeout cut some off, 128 + the number of a
    second signal. Raises `LaunchError` when Triton does not start, ends by itself, or loses the process of a model.
    """
    server = Server(
        repository, grpc_port=grpc_port, http_port=http_port, metrics_port=metrics_port, host=host, verbose=verbose
    )
    with _received_signals() as signals:
        try:
            server.start(cancelled=lambda: bool(signals))
            if not signals:
                on_ready(server.addresses)
            while not signals:
                server.check()
                time.sleep(POLL_S)
            drained = server.drain(drain_timeout, hurry=lambda: len(signals) > 1)
            if len(signals) > 1:
                server.kill()
                return 128 + signals[1]
            return 0 if drained else 1
        finally:
            server.stop()


class _Log:
    """Triton's output: kept back until released, then passed on; the last lines are kept for error messages."""

    def __init__(self, sink: TextIO) -> None:
        self._sink = sink
        self._lines: deque[str] = deque(maxlen=LOG_TAIL_LINES)
        self._released = False
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def follow(self, process: subprocess.Popen[str], *, harmless: re.Pattern[str] | None) -> None:
        self._thread = threading.Thread(target=self._read, args=(process, harmless), daemon=True)
        self._thread.start()

    def _read(self, process: subprocess.Popen[str], harmless: re.Pattern[str] | None) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if harmless is None or not harmless.search(line):
                self.write(line)

    def write(self, line: str) -> None:
        with self._lock:
            self._lines.append(line)
            if self._released:
                self._sink.write(line)
                self._sink.flush()

    def release(self) -> None:
        with self._lock:
            self._released = True
            self._sink.writelines(self._lines)
            self._sink.flush()

    def relevant(self) -> str:
        with self._lock:
            return "".join(self._lines).strip()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join(timeout=2)


def _checked_repository(repository: Path) -> Path:
    if not repository.is_dir():
        raise LaunchError(f"no model repository at {repository}: there is no such folder")
    if not any(repository.glob("*/config.pbtxt")):
        raise LaunchError(f"no models in {repository}: no folder in it holds a config.pbtxt")
    return repository.resolve()


def _free_ports(host: str, wanted: dict[str, int]) -> dict[str, int]:
    """The ports, 0 replaced by a free one. Raises `LaunchError` for one that is taken."""
    taken: list[socket.socket] = []
    ports: dict[str, int] = {}
    try:
        for name, port in wanted.items():
            probe = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            taken.append(probe)
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise LaunchError(f"cannot listen on {host}:{port} ({name} port): {error.strerror}") from error
            ports[name] = probe.getsockname()[1]
    finally:
        for probe in taken:
            probe.close()
    return ports


def _is_ready(http_address: str) -> bool:
    """`/v2/health/ready`: the server answers and every model is ready (Triton's strict readiness, its default)."""
    try:
        with urllib.request.urlopen(f"http://{http_address}/v2/health/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _model_of(stub: psutil.Process) -> str:
    """The model that a stub hosts, from its command line: `triton_python_backend_stub REPO/MODEL/VERSION/model.py ...`."""
    try:
        arguments: Sequence[str] = stub.cmdline()
    except psutil.NoSuchProcess:
        return "?"
    return next((Path(a).parent.parent.name for a in arguments if a.endswith(".py")), "?")


def _describe_status(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def _kill_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        pass


_libc = ctypes.CDLL(None)


def _end_with_parent() -> None:
    """In the child, before exec: SIGTERM when the launcher dies, however it dies."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def _received_signals() -> Iterator[list[int]]:
    """The list of SIGINT and SIGTERM received so far, instead of what they did before."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
