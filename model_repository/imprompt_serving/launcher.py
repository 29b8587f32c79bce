"""Start Triton, report when it is ready, drain it, and clean up after it.

`serve` runs in the foreground (`imprompt serve REPO`); `Server` is a context manager, for tests and the demo. The
module `_triton_install` locates Triton and what it needs, and `drain` explains what a drain means for the models.
"""

from __future__ import annotations

import http.client
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
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self, TextIO

import grpc
import psutil
from tritonclient.grpc import service_pb2, service_pb2_grpc

from imprompt_serving._triton_install import LaunchError, find_triton
from imprompt_serving.drain import DRAIN_FILE_VARIABLE, IN_FLIGHT_METRIC, announce_drain
from imprompt_serving.triton.internal import SECRET_VARIABLE

__all__ = ["Addresses", "LaunchError", "Server", "serve"]

RESPONSE_CACHE_BYTES = 256 * 2**20
# glibc returns freed blocks of at least this size to the system. By default the threshold grows with the blocks that
# were freed before, and after some large requests Triton and the pipelines keep hundreds of megabytes.
MMAP_THRESHOLD_BYTES = 2**20
CLOSED_APIS = "shared-memory,trace,logging,model-repository"
# Calls to other models, and responses, that a Python model can have in flight; further ones wait. Triton's default: 32.
MODEL_THREADS = 64
# How long Triton waits for running requests after SIGTERM. Short, because the drain has already waited, and because
# Triton waits this long whenever a client keeps a stream open, even an idle one.
EXIT_TIMEOUT_S = 3
# After the exit timeout, Triton 2.51 logs "Exiting immediately" and hangs. It is killed after this many more seconds.
KILL_AFTER_S = 1.0
# After the drain timeout, models abort running requests. They must have sent the errors within this time.
DRAIN_GRACE_S = 3.0
POLL_S = 0.1
LOG_TAIL_LINES = 200

# Log lines of Triton to suppress: no GPU found; shutdown (see `EXIT_TIMEOUT_S`); or a coroutine of a model that
# finished before Triton registered it.
HARMLESS = re.compile(
    r"Unable to allocate pinned system memory|CudaDriverHelper has not been initialized|DCGM unable to start"
    r"|Failed to initialize NVML|^Signal \(\d+\) received|Exit timeout expired|^\s*$"
    r"|Cannot remove future from background"
)
# Captures the first line of the reason. Triton logs the traceback on the same line, with escaped line breaks.
LOAD_FAILURE = re.compile(r"failed to load '(?P<model>[^']+)' version \d+: (?:Internal: )?(?P<reason>.+?)(?:\\n|\"?$)")

# Waits until the launcher exits for whatever reason (its end of the pipe closes), then cleans up in its place.
# $1: process group, $2: prefix of the shared memory, $3: scratch folder.
REAPER = """read -r _; kill -s KILL -- "-$1"; rm -rf -- "/dev/shm/$2"* "$3" """


@dataclass(frozen=True, kw_only=True, slots=True)
class Addresses:
    """Addresses that a running server listens on, as `host:port`; `http` is None without an HTTP port."""

    grpc: str
    metrics: str
    http: str | None = None

    def __str__(self) -> str:
        http = f" http={self.http}" if self.http else ""
        return f"grpc={self.grpc}{http} metrics={self.metrics}"


class Server:
    """A Triton server for one model repository: `with Server(repository) as server: Client(server.grpc_address)`.

    Port 0 means any free port; without `http_port`, Triton serves gRPC only. The output of Triton and the models goes
    to `log` (default: stderr): warnings, errors, and output of the models, or everything with `verbose`. It is held
    back until the server is ready; if startup fails, the error quotes it. Leaving the context stops the server without
    a drain. A server cannot be started twice.

    Raises:
        LaunchError: the repository has no models.
    """

    addresses: Addresses
    """Set by `start`."""

    def __init__(
        self,
        repository: str | os.PathLike[str],
        *,
        grpc_port: int = 0,
        http_port: int | None = None,
        metrics_port: int = 0,
        host: str = "127.0.0.1",
        start_timeout: float = 900.0,
        verbose: bool = False,
        log: TextIO | None = None,
    ) -> None:
        self._repository = _checked_repository(Path(repository))
        self._requested_ports = {"grpc": grpc_port, "metrics": metrics_port}
        if http_port is not None:
            self._requested_ports["http"] = http_port
        self._host = host
        self._start_timeout = start_timeout
        self._verbose = verbose
        self._log = _Log(log, verbose=verbose)
        self._clean_up = ExitStack()
        self._process: subprocess.Popen[str] | None = None
        self._stubs: dict[str, psutil.Process] = {}

    @property
    def grpc_address(self) -> str:
        return self.addresses.grpc

    @property
    def http_address(self) -> str | None:
        return self.addresses.http

    @property
    def metrics_address(self) -> str:
        return self.addresses.metrics

    @property
    def pid(self) -> int:
        """Process id of `tritonserver`."""
        return self._running.pid

    @property
    def stub_pids(self) -> dict[str, int]:
        """Process id of each instance of a Python model, by Triton's name for the instance (`<model>_0_0`)."""
        return {name: stub.pid for name, stub in self._stubs.items()}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, *, give_up: Callable[[], bool] = lambda: False) -> bool:
        """Start Triton and wait until all models are ready.

        Returns:
            True when ready; False if `give_up` returned True first. Everything is cleaned up then.

        Raises:
            LaunchError: Triton did not become ready. Everything is cleaned up then.
        """
        try:
            self._spawn()
            ready = self._wait_until_ready(give_up)
        except BaseException:
            self.kill()
            raise
        if not ready:
            self.kill()
        return ready

    def check(self) -> None:
        """Check that Triton and all model processes are running. Triton does not restart model processes.

        Raises:
            LaunchError: one of them has stopped.
        """
        status = self._running.poll()
        if status is not None:
            raise LaunchError(f"Triton stopped unexpectedly ({_describe(status)})" + self._log.excerpt())
        for instance, stub in self._stubs.items():
            if not _alive(stub):
                raise LaunchError(
                    f"the process of model instance {instance!r} (pid {stub.pid}) stopped unexpectedly; Triton "
                    "does not restart it, and all its calls would fail" + self._log.excerpt()
                )

    def drain(self, timeout: float, *, hurry: Callable[[], bool] = lambda: False) -> bool:
        """Have the models refuse new requests, and wait for the running ones.

        After `timeout` seconds, the models abort the requests that still run, each with an error. If `hurry` returns
        True, the wait ends.

        Returns:
            Whether all requests finished in time.

        Raises:
            LaunchError: as for `check`.
        """
        announce_drain(self._drain_file, deadline=time.time() + timeout)
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline + DRAIN_GRACE_S and not hurry():
            self.check()
            if _requests_in_flight(self.addresses.metrics) == 0:
                return time.monotonic() < deadline
            time.sleep(POLL_S)
        return False

    def stop(self, *, hurry: Callable[[], bool] = lambda: False) -> None:
        """Stop Triton with SIGTERM, and kill it after a timeout or if `hurry` returns True. A no-op if nothing runs."""
        if self._process is not None and self._process.poll() is None:
            announce_drain(self._drain_file, deadline=time.time())  # running requests then end with a clear error
            self._process.terminate()
            until = time.monotonic() + EXIT_TIMEOUT_S + KILL_AFTER_S
            while self._process.poll() is None and time.monotonic() < until and not hurry():
                time.sleep(POLL_S)
        self.kill()

    def kill(self) -> None:
        """Kill Triton and the model processes at once, and remove their shared memory and files."""
        self._clean_up.close()
        self._process = None
        self._stubs = {}

    @property
    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            raise LaunchError("the server is not running")
        return self._process

    def _spawn(self) -> None:
        triton = find_triton()
        listen, ports = _free_ports(self._host, self._requested_ports)
        connect_to = "127.0.0.1" if listen == "0.0.0.0" else listen
        self.addresses = Addresses(**{name: f"{connect_to}:{port}" for name, port in ports.items()})
        scratch = Path(self._clean_up.enter_context(tempfile.TemporaryDirectory(prefix="imprompt-")))
        self._drain_file = scratch / "drain"
        shared_memory = f"imprompt_{os.getpid()}_{secrets.token_hex(3)}_"
        self._clean_up.callback(_remove_shared_memory, shared_memory)
        self._process = subprocess.Popen(
            [
                str(triton.binary),
                f"--model-repository={self._repository}",
                "--model-control-mode=none",
                "--disable-auto-complete-config",
                f"--backend-directory={triton.prepare_backends(scratch)}",
                f"--backend-config=python,shm-region-prefix-name={shared_memory}",
                f"--backend-config=python,thread-pool-size={MODEL_THREADS}",
                f"--cache-directory={triton.caches}",
                f"--cache-config=local,size={RESPONSE_CACHE_BYTES}",
                *_listen_options(listen, ports),
                "--grpc-infer-allocation-pool-size=1",  # number of request buffers to keep; default: 8
                f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
                f"--log-info={str(self._verbose).lower()}",
            ],
            env={"MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD_BYTES)}
            | triton.environment()
            | {DRAIN_FILE_VARIABLE: str(self._drain_file), SECRET_VARIABLE: secrets.token_urlsafe()},
            cwd=scratch,  # first on the models' sys.path: a random.py in the user's folder must not shadow anything
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=0,  # Ctrl-C must reach only the launcher, which drains; and one signal kills all stubs
        )
        self._clean_up.callback(_end_group, self._process)
        self._log.follow(self._process)
        reaper = subprocess.Popen(
            ["/bin/sh", "-c", REAPER, "imprompt-reaper", str(self._process.pid), shared_memory, str(scratch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        # Kill the reaper before our own clean-up: it must never signal a new process group that reuses the id.
        self._clean_up.callback(_end_reaper, reaper)

    def _wait_until_ready(self, give_up: Callable[[], bool]) -> bool:
        until = time.monotonic() + self._start_timeout
        while not _is_ready(self.addresses):
            status = self._running.poll()
            if status is not None:
                raise LaunchError(
                    self._log.load_failures() + f"Triton did not start ({_describe(status)})" + self._log.excerpt()
                )
            if time.monotonic() > until:
                raise LaunchError(f"Triton was not ready after {self._start_timeout:g} s" + self._log.excerpt())
            if give_up():
                return False
            time.sleep(POLL_S)
        self._stubs = _stubs_of(self._running.pid)
        self._log.release()
        return True


def serve(
    repository: str | os.PathLike[str],
    *,
    grpc_port: int = 8001,
    http_port: int | None = None,
    metrics_port: int = 8002,
    host: str = "127.0.0.1",
    on_ready: Callable[[Addresses], None],
    drain_timeout: float = 30.0,
    verbose: bool = False,
) -> int:
    """Serve until SIGINT or SIGTERM, then drain; a second signal stops everything at once. Main thread only.

    Returns:
        The exit status: 0 if all requests finished, 1 if some were aborted, and 128 + the signal number for a signal
        before the server was ready, or for a second signal.

    Raises:
        LaunchError: Triton did not start or stopped unexpectedly, or a model process did. A supervisor should restart
            the whole server.
    """
    server = Server(
        repository, grpc_port=grpc_port, http_port=http_port, metrics_port=metrics_port, host=host, verbose=verbose
    )
    with _received_signals() as signals:
        try:
            if not server.start(give_up=lambda: bool(signals)):
                return 128 + signals[0]
            on_ready(server.addresses)
            while not signals:
                server.check()
                time.sleep(POLL_S)
            drained = server.drain(drain_timeout, hurry=lambda: len(signals) > 1)
        except LaunchError:
            server.kill()
            raise
        finally:
            server.stop(hurry=lambda: len(signals) > 1)
        return 128 + signals[1] if len(signals) > 1 else int(not drained)


class _Log:
    """The output of Triton and the models: held back until released, then passed on. Error messages quote its end."""

    def __init__(self, sink: TextIO | None, *, verbose: bool) -> None:
        self._sink = sink
        self._verbose = verbose
        self._pass_on = verbose
        self._lines: deque[str] = deque(maxlen=LOG_TAIL_LINES)
        self._lock = threading.Lock()
        self._reader: threading.Thread | None = None

    def follow(self, process: subprocess.Popen[str]) -> None:
        self._reader = threading.Thread(target=self._read, args=(process.stdout,), daemon=True)
        self._reader.start()

    def release(self) -> None:
        with self._lock:
            if not self._pass_on:
                self._pass_on = True
                self._write("".join(self._lines))

    def excerpt(self) -> str:
        """Return the end of the log, to append to an error message; empty if the log was already passed on."""
        self._join()
        with self._lock:
            shown = [] if self._pass_on else self._lines
            # Triton logs a traceback on one line, with escaped line breaks.
            return "".join("\n" + line.rstrip().replace("\\n", "\n") for line in shown)

    def load_failures(self) -> str:
        """Return a line for each model that failed to load: `model 'x' failed to load: ValueError: ...`."""
        self._join()
        with self._lock:
            failures = [match for line in self._lines if (match := LOAD_FAILURE.search(line))]
        return "".join(f"model {match['model']!r} failed to load: {match['reason']}\n" for match in failures)

    def _join(self) -> None:
        """Give the reader a moment for the last output. It ends when the last process that writes has exited."""
        if self._reader is not None:
            self._reader.join(timeout=0.5)

    def _read(self, lines: TextIO) -> None:
        with lines:
            for line in lines:
                if self._verbose or not HARMLESS.search(line):
                    with self._lock:
                        self._lines.append(line)
                        if self._pass_on:
                            self._write(line)

    def _write(self, text: str) -> None:
        sink = self._sink or sys.stderr
        with suppress(OSError, ValueError):  # the sink is closed: keep serving, and keep reading the output
            sink.write(text)
            sink.flush()


def _checked_repository(repository: Path) -> Path:
    if not repository.is_dir():
        raise LaunchError(f"no model repository at {repository}: no such folder")
    if not any(repository.glob("*/config.pbtxt")):
        raise LaunchError(f"no model in {repository}: no subfolder has a config.pbtxt")
    return repository.resolve()


def _free_ports(host: str, requested: dict[str, int]) -> tuple[str, dict[str, int]]:
    """Return the numeric address (Triton accepts no host names), and the ports, with free ones in place of 0."""
    ports: dict[str, int] = {}
    with ExitStack() as probes:  # keep all open until the end, so that no port is assigned twice
        for name, port in requested.items():
            probe = probes.enter_context(socket.socket())
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                address = socket.gethostbyname(host)
                probe.bind((address, port))
            except OSError as error:
                raise LaunchError(f"cannot listen on {host}:{port} (the {name} port): {error.strerror}") from error
            ports[name] = probe.getsockname()[1]
    return address, ports


def _get(address: str, path: str) -> tuple[int, str]:
    """Return status and text of an HTTP GET. Not with urllib, which would use a proxy from the environment."""
    connection = http.client.HTTPConnection(address, timeout=5)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def _is_ready(addresses: Addresses) -> bool:
    """Return whether all ports answer and every model is ready (Triton's default, strict readiness)."""
    # Open a new channel each time: after failures, a channel waits longer and longer before it reconnects.
    with grpc.insecure_channel(addresses.grpc, [("grpc.enable_http_proxy", 0)]) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            ready = bool(stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=5).ready)
        except grpc.RpcError:
            return False
    # Triton opens these after its gRPC port.
    return ready and all(_listens(address) for address in (addresses.metrics, addresses.http) if address)


def _listens(address: str) -> bool:
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def _listen_options(address: str, ports: dict[str, int]) -> list[str]:
    """Return Triton's options for its ports, with access to its administrative APIs closed.

    They require a header with a random value that is never stored. `--model-control-mode=none` also disables loading
    and unloading.
    """
    closed = f"{CLOSED_APIS}:imprompt-operator={secrets.token_urlsafe()}"
    options = [f"--{name}-address={address}" for name in ports]
    options += [f"--{name}-port={port}" for name, port in ports.items()]
    options.append(f"--grpc-restricted-protocol={closed}")
    options.append(f"--http-restricted-api={closed}" if "http" in ports else "--allow-http=false")
    return options


def _requests_in_flight(metrics_address: str) -> int | None:
    """Sum the in-flight gauges of the models; None if Triton does not answer."""
    try:
        _, text = _get(metrics_address, "/metrics")
    except (OSError, http.client.HTTPException):
        return None
    return sum(int(float(value)) for value in re.findall(rf"^{IN_FLIGHT_METRIC}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


def _stubs_of(triton: int) -> dict[str, psutil.Process]:
    """Find the processes that host Python models, by instance; they run `STUB .../MODEL/1/model.py ...`."""
    stubs: dict[str, psutil.Process] = {}
    for child in psutil.Process(triton).children():
        with suppress(psutil.NoSuchProcess):
            arguments = child.cmdline()
            if arguments and arguments[0].endswith("triton_python_backend_stub"):
                model = Path(arguments[1]).parent.parent.name
                # Search for the instance: its position among the arguments is an internal of Triton and may change.
                stubs[next((a for a in arguments if a.startswith(f"{model}_")), f"{model} {child.pid}")] = child
    return stubs


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _describe(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def _end_group(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    until = time.monotonic() + KILL_AFTER_S
    while _group_alive(process.pid) and time.monotonic() < until:  # the stubs are not our children: poll
        time.sleep(0.01)


def _group_alive(group: int) -> bool:
    for process in psutil.process_iter(["status"]):
        with suppress(ProcessLookupError):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
    return False


def _end_reaper(reaper: subprocess.Popen[bytes]) -> None:
    reaper.kill()
    reaper.wait()
    assert reaper.stdin is not None
    reaper.stdin.close()


def _remove_shared_memory(prefix: str) -> None:
    for region in Path("/dev/shm").glob(f"{prefix}*"):
        region.unlink(missing_ok=True)


@contextmanager
def _received_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list, in place of their previous handlers."""
    received: list[int] = []

    def append(number: int, frame: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, append) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
