"""Starts the Triton that is there, says when it is ready, drains it, and leaves nothing behind.

`serve` is the foreground command (`imprompt serve REPO`); `Server` is the same as a context manager, for tests and the
demo. Which Triton, and what it needs around it: `_triton_install`. What a drain means to the models: `drain`.
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
# From this size on glibc returns memory to the system when it is freed. By default that size grows with what was freed
# before, and after some large requests Triton and the pipelines keep hundreds of megabytes.
MMAP_THRESHOLD_BYTES = 2**20
CLOSED_APIS = "shared-memory,trace,logging,model-repository"
# Calls between models, and answers, that one Python model can have under way; others wait. (Triton's default: 32)
CALLS_BETWEEN_MODELS = 64
# Triton's own wait for running requests after SIGTERM. Short, as the drain came before, and as a stream that a client
# keeps open, even idle, keeps its model from being unloaded: Triton then waits for the whole of it.
EXIT_TIMEOUT_S = 3
# Then Triton 2.51 says "Exiting immediately", and hangs. So it is killed this much later.
KILL_AFTER_S = 1.0
# From the end of the drain timeout until the models must have answered the requests that they break off.
DRAIN_GRACE_S = 3.0
POLL_S = 0.1
LOG_TAIL_LINES = 200

# Lines of Triton that say nothing: on a machine without a GPU, when it is told to stop (see `EXIT_TIMEOUT_S`), or when a
# coroutine of a model ended before Triton looked at it.
HARMLESS = re.compile(
    r"Unable to allocate pinned system memory|CudaDriverHelper has not been initialized|DCGM unable to start"
    r"|Failed to initialize NVML|Cannot remove future from background|^Signal \(\d+\) received|Exit timeout expired|^\s*$"
)
# The first line of the reason; what follows (a traceback) has its line ends escaped.
LOAD_FAILURE = re.compile(r"failed to load '(?P<model>[^']+)' version \d+: (?:Internal: )?(?P<reason>.+?)(?:\\n|\"?$)")

# Waits until the launcher is gone, however it went (its end of the pipe closes), then clears up in its place.
# $1: process group, $2: prefix of the shared memory, $3: scratch folder.
REAPER = """read -r _; kill -s KILL -- "-$1"; rm -rf -- "/dev/shm/$2"* "$3" """


@dataclass(frozen=True, kw_only=True, slots=True)
class Addresses:
    """Where a running server listens, each as `host:port`; `http` is None when that port is off."""

    grpc: str
    metrics: str
    http: str | None = None

    def __str__(self) -> str:
        http = f" http={self.http}" if self.http else ""
        return f"grpc={self.grpc}{http} metrics={self.metrics}"


class Server:
    """One Triton over one model repository: `with Server(repository) as server: Client(server.grpc_address)`.

    A port 0 means any free one; without an `http_port` Triton speaks gRPC only. What Triton and the models print goes
    to `log` (default: stderr): warnings, errors and the models' own output, or all of it if `verbose`. Until the server
    is ready it is kept back; if it never gets ready, it is in the error. Leaving the context stops without a drain. Not
    to be started twice.

    Raises `LaunchError` for a repository without models.
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
        self._wanted_ports = {"grpc": grpc_port, "metrics": metrics_port}
        if http_port is not None:
            self._wanted_ports["http"] = http_port
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
        """The process id of `tritonserver`."""
        return self._running.pid

    @property
    def stub_pids(self) -> dict[str, int]:
        """The process of each instance of a Python model, by Triton's name of the instance (`<model>_0_0`)."""
        return {name: stub.pid for name, stub in self._stubs.items()}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, *, give_up: Callable[[], bool] = lambda: False) -> bool:
        """Starts Triton and waits until all models are ready; False, with nothing left, when `give_up` said yes before.

        Raises `LaunchError`, with nothing left running, when it does not get ready.
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
        """Raises `LaunchError` when Triton has ended, or the process of a model has: Triton does not restart those."""
        status = self._running.poll()
        if status is not None:
            raise LaunchError(f"Triton ended by itself ({_describe(status)})" + self._log.excerpt())
        for instance, stub in self._stubs.items():
            if not _alive(stub):
                raise LaunchError(
                    f"the process of model instance {instance!r} (pid {stub.pid}) ended by itself; Triton does not "
                    "start it again, and all its calls would fail" + self._log.excerpt()
                )

    def drain(self, timeout: float, *, hurry: Callable[[], bool] = lambda: False) -> bool:
        """Tells the models to take no new requests, and waits for the running ones. True: all ended by themselves.

        After `timeout` seconds the models break off what still runs, each request with its answer. `hurry` ends the
        wait. Raises as `check` does.
        """
        announce_drain(self._drain_file, deadline=time.time() + timeout)
        in_time = time.monotonic() + timeout
        while time.monotonic() < in_time + DRAIN_GRACE_S and not hurry():
            self.check()
            if _requests_in_flight(self.addresses.metrics) == 0:
                return time.monotonic() < in_time
            time.sleep(POLL_S)
        return False

    def stop(self, *, hurry: Callable[[], bool] = lambda: False) -> None:
        """Ends Triton with SIGTERM, by force when it takes too long or `hurry` says so. Harmless when nothing runs."""
        if self._process is not None and self._process.poll() is None:
            announce_drain(self._drain_file, deadline=time.time())  # requests that still run end by name, not as broken
            self._process.terminate()
            until = time.monotonic() + EXIT_TIMEOUT_S + KILL_AFTER_S
            while self._process.poll() is None and time.monotonic() < until and not hurry():
                time.sleep(POLL_S)
        self.kill()

    def kill(self) -> None:
        """Ends Triton and the processes of the models at once, and removes their shared memory and files."""
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
        listen, ports = _free_ports(self._host, self._wanted_ports)
        reach = "127.0.0.1" if listen == "0.0.0.0" else listen
        self.addresses = Addresses(**{name: f"{reach}:{port}" for name, port in ports.items()})
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
                f"--backend-config=python,thread-pool-size={CALLS_BETWEEN_MODELS}",
                f"--cache-directory={triton.caches}",
                f"--cache-config=local,size={RESPONSE_CACHE_BYTES}",
                *_listen_options(listen, ports),
                "--grpc-infer-allocation-pool-size=1",  # kept request buffers; Triton's default: 8
                f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
                f"--log-info={str(self._verbose).lower()}",
            ],
            env={"MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD_BYTES)}
            | triton.environment()
            | {DRAIN_FILE_VARIABLE: str(self._drain_file), SECRET_VARIABLE: secrets.token_urlsafe()},
            cwd=scratch,  # first on the models' sys.path: a random.py where the user stands must not get in the way
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=0,  # Ctrl-C must reach the launcher only, which drains; and all stubs can be ended together
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
        # Ended before the clean-up that it would do, so that it never meets a process group that got the number anew.
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
    """Serves until SIGINT or SIGTERM, then drains; a second signal ends everything at once. Main thread only.

    Returns the exit status: 0 when all requests had ended, 1 when some were broken off, 128 + the number of the signal
    when one came before the server was ready, or a second one. Raises `LaunchError` when Triton does not start, ends by
    itself, or loses the process of a model (a supervisor should start the whole server again).
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
    """What Triton and the models print: kept back until released, then passed on. Error messages quote its end."""

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
        """The end of the log as the rest of an error message; nothing if the reader has it on the screen already."""
        self._join()
        with self._lock:
            shown = [] if self._pass_on else self._lines
            # Triton puts a traceback in one line, with its line ends escaped.
            return "".join("\n" + line.rstrip().replace("\\n", "\n") for line in shown)

    def load_failures(self) -> str:
        """A line for each model that failed to load: `model 'x' failed to load: ValueError: ...`."""
        self._join()
        with self._lock:
            failures = [match for line in self._lines if (match := LOAD_FAILURE.search(line))]
        return "".join(f"model {match['model']!r} failed to load: {match['reason']}\n" for match in failures)

    def _join(self) -> None:
        """The reader ends with the last process that writes; this gives it a moment for their last words."""
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
        with suppress(OSError, ValueError):  # closed: the server goes on, and its output must go on being read
            sink.write(text)
            sink.flush()


def _checked_repository(repository: Path) -> Path:
    if not repository.is_dir():
        raise LaunchError(f"no model repository at {repository}: there is no such folder")
    if not any(repository.glob("*/config.pbtxt")):
        raise LaunchError(f"no model in {repository}: no folder in it holds a config.pbtxt")
    return repository.resolve()


def _free_ports(host: str, wanted: dict[str, int]) -> tuple[str, dict[str, int]]:
    """The numeric address (Triton takes no names), and the ports with each 0 replaced by a free one."""
    ports: dict[str, int] = {}
    with ExitStack() as held:  # all at once, so that no port is given out twice
        for name, port in wanted.items():
            probe = held.enter_context(socket.socket())
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                address = socket.gethostbyname(host)
                probe.bind((address, port))
            except OSError as error:
                raise LaunchError(f"cannot listen on {host}:{port} (the {name} port): {error.strerror}") from error
            ports[name] = probe.getsockname()[1]
    return address, ports


def _get(address: str, path: str) -> tuple[int, str]:
    """Status and text of a plain HTTP GET. (Not urllib, which would ask a proxy named in the environment.)"""
    connection = http.client.HTTPConnection(address, timeout=5)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def _is_ready(addresses: Addresses) -> bool:
    """The server answers on all its ports and every model is ready (Triton's strict readiness, its default)."""
    # A new channel each time: one that saw no server waits longer and longer before it looks again.
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
    """Options of Triton for its ports, with the parts of its API closed that only an operator may use.

    They open for a header that nobody knows. Loading and unloading is refused by `--model-control-mode=none` too.
    """
    closed = f"{CLOSED_APIS}:imprompt-operator={secrets.token_urlsafe()}"
    options = [f"--{name}-address={address}" for name in ports]
    options += [f"--{name}-port={port}" for name, port in ports.items()]
    options.append(f"--grpc-restricted-protocol={closed}")
    options.append(f"--http-restricted-api={closed}" if "http" in ports else "--allow-http=false")
    return options


def _requests_in_flight(metrics_address: str) -> int | None:
    """What the models' gauges say, summed; None if Triton does not answer."""
    try:
        _, text = _get(metrics_address, "/metrics")
    except (OSError, http.client.HTTPException):
        return None
    return sum(int(float(value)) for value in re.findall(rf"^{IN_FLIGHT_METRIC}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


def _stubs_of(triton: int) -> dict[str, psutil.Process]:
    """The processes that host Python models, by instance; their command line is `STUB .../MODEL/1/model.py ...`."""
    stubs: dict[str, psutil.Process] = {}
    for child in psutil.Process(triton).children():
        with suppress(psutil.NoSuchProcess):
            arguments = child.cmdline()
            if arguments and arguments[0].endswith("triton_python_backend_stub"):
                model = Path(arguments[1]).parent.parent.name
                # The place of the instance among the arguments is Triton's own business: it may change.
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
    while _group_alive(process.pid) and time.monotonic() < until:  # the stubs are not ours to wait for
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
