"""Triton's process, the processes of its models, and what they leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil

# How long to wait for killed processes to be gone.
GONE_AFTER_S = 1.0

# Waits until the launcher exits for whatever reason (its end of the pipe closes), then cleans up in its place.
# $1: process group, $2: prefix of the shared memory, $3: scratch folder.
REAPER = """read -r _; kill -s KILL -- "-$1"; rm -rf -- "/dev/shm/$2"* "$3" """


def start_reaper(group: int, shared_memory: str, scratch: Path) -> subprocess.Popen[bytes]:
    """Start the process that cleans up if the launcher is killed."""
    return subprocess.Popen(
        ["/bin/sh", "-c", REAPER, "imprompt-reaper", str(group), shared_memory, str(scratch)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def end_reaper(reaper: subprocess.Popen[bytes]) -> None:
    reaper.kill()
    reaper.wait()
    assert reaper.stdin is not None
    reaper.stdin.close()


def stubs_of(triton: int) -> dict[str, psutil.Process]:
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


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def describe_exit(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def end_group(process: subprocess.Popen[str]) -> None:
    """Kill `process` and its process group, and wait until they are gone."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    until = time.monotonic() + GONE_AFTER_S
    while _is_group_alive(process.pid) and time.monotonic() < until:  # the stubs are not our children: poll
        time.sleep(0.01)


def _is_group_alive(group: int) -> bool:
    for process in psutil.process_iter(["status"]):
        with suppress(ProcessLookupError):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
    return False


def remove_shared_memory(prefix: str) -> None:
    for region in Path("/dev/shm").glob(f"{prefix}*"):
        region.unlink(missing_ok=True)
