"""A Triton server: start, check, drain, stop."""

from __future__ import annotations

import os
import secrets
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

import psutil

from imprompt_serving.drain import DRAIN_FILE_VARIABLE, announce_drain
from imprompt_serving.heartbeat import FOLDER_VARIABLE, Pulse, read_pulses
from imprompt_serving.launcher.addresses import Addresses, free_ports
from imprompt_serving.launcher.command import EXIT_TIMEOUT_S, triton_command
from imprompt_serving.launcher.install import LaunchError, find_triton
from imprompt_serving.launcher.loading import Loading
from imprompt_serving.launcher.log import Log
from imprompt_serving.launcher.probes import is_ready, requests_in_flight
from imprompt_serving.launcher.processes import (
    describe_exit,
    end_group,
    end_reaper,
    is_alive,
    remove_shared_memory,
    start_reaper,
    stubs_of,
)
from imprompt_serving.triton.internal import SECRET_VARIABLE

# glibc returns freed blocks of at least this size to the system. By default the threshold grows with the blocks that
# were freed before, and after some large requests Triton and the pipelines keep hundreds of megabytes.
MMAP_THRESHOLD_BYTES = 2**20
# After the exit timeout, Triton 2.51 logs "Exiting immediately" and hangs. It is killed after this many more seconds.
KILL_AFTER_S = 1.0
# After the drain timeout, models abort running requests. They must have sent the errors within this time.
DRAIN_GRACE_S = 3.0
# After a failure, models that still run have this long to end their requests. They check for a drain every 0.25 s.
ABORT_GRACE_S = 1.0
POLL_S = 0.1
# On a busy machine, Triton 2.51 may abort while it starts (`boost::interprocess::lock_exception`): it gives up on a
# model process that gets no core for a second.
START_ATTEMPTS = 3


class TritonCrashed(LaunchError):
    """Triton died of a signal while it started."""


class Server:
    """A Triton server for one model repository: `with Server(repository) as server: Client(server.grpc_address)`.

    Port 0 means any free port; without `http_port`, Triton serves gRPC only. The output of Triton and the models goes
    to `log` (default: stderr): warnings, errors, and output of the models, or everything with `verbose`. It is held
    back until the server is ready; if startup fails, the error quotes it. Leaving the context stops the server without
    a drain. After `stop` or `kill`, it can be started again, on the same ports. Triton sends its own spans to the
    OpenTelemetry collector `triton_spans_to` (OTLP over HTTP), for requests whose caller traces them.

    Raises:
        LaunchError: the repository has no models.
    """

    addresses: Addresses
    """Set by `start`."""
    secret: str
    """Set by `start`: proves to the models that a call comes from this server."""

    def __init__(
        self,
        repository: str | os.PathLike[str],
        *,
        grpc_port: int = 0,
        http_port: int | None = None,
        metrics_port: int = 0,
        host: str = "127.0.0.1",
        start_timeout: float = 900.0,
        triton_spans_to: str | None = None,
        verbose: bool = False,
        log: TextIO | None = None,
    ) -> None:
        self.repository = _checked_repository(Path(repository))
        self._requested_ports = {"grpc": grpc_port, "metrics": metrics_port}
        if http_port is not None:
            self._requested_ports["http"] = http_port
        self._host = host
        self._start_timeout = start_timeout
        self._spans_to = triton_spans_to
        self._verbose = verbose
        self._log = Log(log, verbose=verbose)
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
    def processes(self) -> dict[str, psutil.Process]:
        """The processes of the server: `tritonserver`, and the instances of Python models by Triton's names."""
        return {"tritonserver": psutil.Process(self.pid), **self._stubs}

    def pulses(self) -> dict[str, Pulse]:
        """Read the heartbeats of Python models, by instance."""
        return read_pulses(self._heartbeats)

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

    def start(
        self,
        *,
        give_up: Callable[[], bool] = lambda: False,
        on_loading: Callable[[str], None] = lambda message: None,
    ) -> bool:
        """Start Triton and wait until all models are ready. Whenever one is, `on_loading` gets a message.

        Returns:
            True when ready; False if `give_up` returned True first. Everything is cleaned up then.

        Raises:
            LaunchError: Triton did not become ready. Everything is cleaned up then.
        """
        for attempt in range(1, START_ATTEMPTS + 1):
            try:
                self._spawn()
                ready = self._wait_until_ready(give_up, on_loading)
            except TritonCrashed:
                self.kill()
                if attempt == START_ATTEMPTS:
                    raise
            except BaseException:
                self.kill()
                raise
            else:
                break
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
            raise LaunchError(f"Triton stopped unexpectedly ({describe_exit(status)})" + self._log.excerpt())
        for instance, stub in self._stubs.items():
            if not is_alive(stub):
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
            if requests_in_flight(self.addresses.metrics) == 0:
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

    def abort(self) -> None:
        """Let running requests end with a clear error, if their models still can, and kill everything."""
        if self._process is not None and self._process.poll() is None:
            with suppress(OSError):  # the disk is full
                announce_drain(self._drain_file, deadline=time.time())
            until = time.monotonic() + ABORT_GRACE_S
            while time.monotonic() < until and self._process.poll() is None:
                if requests_in_flight(self.addresses.metrics, ABORT_GRACE_S) == 0:
                    break
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
        listen, ports = free_ports(self._host, self._requested_ports)
        connect_to = "127.0.0.1" if listen == "0.0.0.0" else listen
        self.addresses = Addresses(**{name: f"{connect_to}:{port}" for name, port in ports.items()})
        self._requested_ports = ports  # keep them if the server is started again
        scratch = Path(self._clean_up.enter_context(tempfile.TemporaryDirectory(prefix="imprompt-")))
        self._drain_file = scratch / "drain"
        self._heartbeats = scratch / "heartbeats"
        self._heartbeats.mkdir()
        self.secret = secrets.token_urlsafe()
        shared_memory = f"imprompt_{os.getpid()}_{secrets.token_hex(3)}_"
        self._clean_up.callback(remove_shared_memory, shared_memory)
        self._process = subprocess.Popen(
            triton_command(
                triton,
                self.repository,
                address=listen,
                ports=ports,
                scratch=scratch,
                shared_memory=shared_memory,
                spans_to=self._spans_to,
                verbose=self._verbose,
            ),
            env={"MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD_BYTES)}
            | triton.environment()
            | {
                "TMPDIR": str(scratch),  # AOTInductor unpacks engines there, and leaves them if it is killed
                DRAIN_FILE_VARIABLE: str(self._drain_file),
                FOLDER_VARIABLE: str(self._heartbeats),
                SECRET_VARIABLE: self.secret,
            },
            cwd=scratch,  # first on the models' sys.path: a random.py in the user's folder must not shadow anything
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=0,  # Ctrl-C must reach only the launcher, which drains; and one signal kills all stubs
        )
        self._clean_up.callback(end_group, self._process)
        self._log.follow(self._process)
        reaper = start_reaper(self._process.pid, shared_memory, scratch)
        # Kill the reaper before our own clean-up: it must never signal a new process group that reuses the id.
        self._clean_up.callback(end_reaper, reaper)

    def _wait_until_ready(self, give_up: Callable[[], bool], on_loading: Callable[[str], None]) -> bool:
        until = time.monotonic() + self._start_timeout
        loading, message = Loading(self.repository), ""
        while not is_ready(self.addresses):
            status = self._running.poll()
            if status is not None:
                raise (TritonCrashed if status < 0 else LaunchError)(
                    self._log.load_failures() + f"Triton did not start ({describe_exit(status)})" + self._log.excerpt()
                )
            if time.monotonic() > until:
                raise LaunchError(f"Triton was not ready after {self._start_timeout:g} s" + self._log.excerpt())
            if give_up():
                return False
            before, message = message, loading.message(self.pulses())
            if message != before:
                on_loading(message)
            time.sleep(POLL_S)
        self._stubs = stubs_of(self._running.pid)
        self._log.release()
        return True


def _checked_repository(repository: Path) -> Path:
    if not repository.is_dir():
        raise LaunchError(f"no model repository at {repository}: no such folder")
    if not any(repository.glob("*/config.pbtxt")):
        raise LaunchError(f"no model in {repository}: no subfolder has a config.pbtxt")
    return repository.resolve()
