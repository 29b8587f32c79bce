"""The faults: each is injected while callers make pictures, and says what it expects."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from faults.callers import Callers
from faults.changed_models import failing_engine, movable_clock, poisoned_jobs, set_clock
from faults.server import Foreground, wait_for

NOTICE_LIMIT_S = 10.0
RECOVERY_LIMIT_S = 300.0
"""Far above what a restart takes, because the machine may be busy."""
QUIET_S = 12.0
"""How long to watch that a fault which the server withstands does not make the watchdog restart it: longer than the
watchdog takes to notice a failure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What one fault did. Times are in seconds after the injection."""

    case: str
    noticed: float | None
    """When the launcher noticed; None if there was nothing to notice."""
    reason: str
    pictures: float
    """When a request that was sent after the failure first got its picture."""
    seen: dict[str, int]
    """Errors of callers that do not retry, and of streams that had reported progress, without addresses and times."""
    lost: list[str]
    """Errors of callers that retry."""
    unanswered: int
    """Callers that still waited at the end."""


Inject = Callable[[Foreground, ExitStack], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A fault: `inject` causes it; what it opens on the stack is closed at the end."""

    name: str
    inject: Inject
    restarts: bool = True
    """Whether the server must be restarted."""
    steps: int = 10
    serve: Callable[[Path, Path], AbstractContextManager[Foreground]] | None = None
    """Serves the repository (the first path) with changed models; the second path is an empty folder."""
    small_folders: bool = False
    """Whether the server's temporary folder has only 64 MB, and its `/dev/shm` 100 MB. This needs root."""


def run(case: Case, server: Foreground, models: list[str], *, quiet: float = QUIET_S) -> Outcome:
    """Inject one fault into a running server under load, and watch for `quiet` seconds that it withstands the fault.

    Raises:
        AssertionError: the fault was not noticed in time, or there were no pictures again, or a restart for no reason.
    """
    with ExitStack() as held, Callers(server.addresses["grpc"], models, num_inference_steps=case.steps) as callers:
        wait_for(lambda: len(callers.pictures()) >= 6, 120, "pictures before the fault")
        began = time.monotonic()
        case.inject(server, held)
        noticed, reason = None, ""
        if case.restarts:
            at, reason = wait_for(lambda: server.failure(began), 2 * NOTICE_LIMIT_S, f"{case.name}: noticed")
            noticed = at - began
        else:
            time.sleep(quiet)
            assert server.failure(began) is None, server.failure(began)
        since = began + (noticed or 0.0)
        try:
            again = wait_for(lambda: callers.pictures(since), RECOVERY_LIMIT_S, f"{case.name}: pictures again")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{server.output()[-3000:]}") from None
        unanswered = callers.stop()
        return Outcome(
            case=case.name,
            noticed=noticed,
            reason=reason,
            pictures=min(one.ended for one in again) - began,
            seen={_plain(error): count for error, count in callers.errors(since=began).items()},
            lost=callers.lost(),
            unanswered=unanswered,
        )


def _plain(error: str) -> str:
    return re.sub(r"127\.0\.0\.1:\d+|\d+(\.\d+)? s\b|\(pid \d+\)", "…", error)[:160]


def send(number: int, name: str) -> Inject:
    """Send a signal to `tritonserver` or the process of a model."""

    def inject(server: Foreground, held: ExitStack) -> None:
        server.processes()[name].send_signal(number)

    return inject


def killed_clients(server: Foreground, held: ExitStack) -> None:
    """Kill clients that read a stream, and others that upload 60 MB."""
    code = """
import sys, io, imprompt
client = imprompt.Client(sys.argv[1])
print(flush=True)
picture = b"\\x89PNG" + bytes(60_000_000) if sys.argv[3] == "upload" else None
while True:
    try:
        if picture is None:
            for event in client.stream(model=sys.argv[2], prompt="x", num_inference_steps=200):
                pass
        else:
            client.generate(model=sys.argv[2], prompt="x", image=picture)
    except imprompt.ImpromptError:
        pass
"""
    bundle = next(iter(server.health()[1]["bundles"]))
    for kind in ("stream", "upload") * 4:
        arguments = [sys.executable, "-c", code, server.addresses["grpc"], bundle, kind]
        client = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        held.callback(client.wait)
        held.callback(client.kill)
        assert client.stdout is not None
        client.stdout.readline()
        time.sleep(0.5)  # let it come to the middle of a stream or an upload
        client.kill()


def slow_readers(server: Foreground, held: ExitStack) -> None:
    """Open streams of large pictures, and never read from them."""
    bundle = next(iter(server.health()[1]["bundles"]))
    for _ in range(4):
        options = [("grpc.enable_http_proxy", 0), ("grpc.http2.lookahead_bytes", 1024)]
        channel = held.enter_context(grpc.insecure_channel(server.addresses["grpc"], options))
        call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(_large_requests(f"{bundle}_stream"))
        held.callback(call.cancel)


def _large_requests(model: str, count: int = 2) -> Iterator[service_pb2.ModelInferRequest]:
    for _ in range(count):
        request = service_pb2.ModelInferRequest(model_name=model)
        values = {"height": 128, "width": 128, "num_inference_steps": 2, "num_images_per_prompt": 8}
        request.inputs.add(name="prompt", datatype="BYTES", shape=[1])
        request.raw_input_contents.append(b"\1\0\0\0x")
        for name, value in values.items():
            request.inputs.add(name=name, datatype="INT32", shape=[1])
            request.raw_input_contents.append(np.array([value], np.int32).tobytes())
        yield request


def idle_connections(server: Foreground, held: ExitStack) -> None:
    host, port = server.addresses["grpc"].split(":")
    for _ in range(500):
        held.enter_context(socket.create_connection((host, int(port))))


def second_server(server: Foreground, held: ExitStack) -> None:
    """Start a second server on the same ports: it must refuse and leave the first one alone."""
    ports = [f"--{name}-port={server.addresses[name].split(':')[1]}" for name in ("grpc", "metrics")]
    command = [str(Path(sys.executable).with_name("imprompt")), "serve", str(server.repository), *ports]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "Address already in use" in done.stderr


def strangers(server: Foreground, held: ExitStack) -> None:
    """Call internal models without the secret, with token ids that no encoder knows."""
    bundle = next(iter(server.health()[1]["bundles"]))
    channel = held.enter_context(grpc.insecure_channel(server.addresses["grpc"], [("grpc.enable_http_proxy", 0)]))
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    for number in range(200):
        request = service_pb2.ModelInferRequest(model_name=f"{bundle}_text_encoder")
        for name, value in (("input_ids", np.full((1, 32), 10**6 + number)), ("clip_skip", np.zeros((1, 1)))):
            request.inputs.add(name=name, datatype="INT64", shape=value.shape)
            request.raw_input_contents.append(value.astype(np.int64).tobytes())
        try:
            stub.ModelInfer(request, timeout=30)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
                raise
        else:
            raise AssertionError("a stranger was served")


def full_disk(server: Foreground, held: ExitStack) -> None:
    """Fill the file system of the server's scratch folder."""
    root = Path(f"/proc/{server.launcher.pid}/root")
    folder = root / server.launcher.environ()["TMPDIR"].lstrip("/")
    with (folder / "fill").open("wb") as file:
        held.callback((folder / "fill").unlink)
        try:
            while True:
                file.write(bytes(2**16))
                file.flush()
        except OSError:
            pass


def full_shared_memory(server: Foreground, held: ExitStack) -> None:
    """Request more pictures at once than `/dev/shm` has room for."""
    bundle = next(iter(server.health()[1]["bundles"]))
    size = {"height": 128, "width": 128, "num_images_per_prompt": 64}
    large = Callers(server.addresses["grpc"], [bundle], count=4, num_inference_steps=1, **size)
    held.enter_context(large)


def replaced_repository(server: Foreground, held: ExitStack) -> None:
    """Replace the repository with a copy while it is served, then kill a process: the restart loads the copy."""
    old = server.repository.with_name(f"{server.repository.name}.old")
    server.repository.rename(old)
    shutil.copytree(old, server.repository, symlinks=True)
    shutil.rmtree(old)
    next(process for name, process in server.processes().items() if name.endswith("_denoiser")).kill()


def drained(server: Foreground, models: list[str], steps: int) -> Outcome:
    """Send SIGTERM under load. `pictures` is when the server had ended."""
    with Callers(server.addresses["grpc"], models, num_inference_steps=steps) as callers:
        wait_for(lambda: callers.progress or callers.seen, 120, "the callers' requests run")
        began, running = time.monotonic(), callers.running()
        server.process.terminate()
        status = server.process.wait(60)
        ended = time.monotonic()
        unanswered = callers.stop(150)
    seen = [one for one in callers.seen if one.began in running]
    return Outcome(
        case=f"SIGTERM, requests of {steps} steps",
        noticed=None,
        reason=f"exit status {status}",
        pictures=ended - began,
        seen=dict(Counter(_plain(one.error) or "picture" for one in seen)),
        lost=[],
        unanswered=unanswered,
    )


MODELS = ("", "_stream", "_denoiser", "_text_encoder", "_image_encoder_plain", "_vae_encoder", "_vae_decoder")


def cases(bundle: str) -> list[Case]:
    """List the faults of a running server that serves `bundle`."""
    names = ["tritonserver", *(bundle + model for model in MODELS)]
    dead = [Case(name=f"kill -9 {name}", inject=send(signal.SIGKILL, name)) for name in names]
    hung = [Case(name=f"SIGSTOP {name}", inject=send(signal.SIGSTOP, name)) for name in names]
    return [
        *dead,
        *hung,
        Case(name="clients killed mid-stream and mid-upload", inject=killed_clients, restarts=False),
        Case(name="4 streams that nobody reads", inject=slow_readers, restarts=False),
        Case(name="500 idle connections", inject=idle_connections, restarts=False),
        Case(name="second server on the same ports", inject=second_server, restarts=False),
        Case(name="poisoned batch from a stranger", inject=strangers, restarts=False),
        Case(name="jobs that fail in the engine", inject=poisoned_jobs, serve=failing_engine, restarts=False),
        Case(name="clock set a day ahead and back", inject=set_clock, serve=movable_clock, restarts=False),
        Case(name="full disk", inject=full_disk, restarts=False, small_folders=True),
        Case(name="large pictures in a small /dev/shm", inject=full_shared_memory, restarts=False, small_folders=True),
        Case(name="repository replaced, then a process killed", inject=replaced_repository),
    ]
