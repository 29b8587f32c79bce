"""Resource usage of a server: memory, threads and file descriptors of each process, and shared memory."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.table import Table

from imprompt_serving.launcher import Server

SHARED_MEMORY = "/dev/shm"


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Usage of one process (resident memory in MB), or of `/dev/shm`, where `files` counts shared memory regions."""

    memory: float
    threads: int
    files: int


def processes(server: Server) -> dict[str, psutil.Process]:
    """Return the processes of `server` by name."""
    return {name: psutil.Process(pid) for name, pid in {"tritonserver": server.pid, **server.stub_pids}.items()}


def ended(known: dict[str, psutil.Process]) -> list[str]:
    """Name the processes that have ended, including those whose PID was reused."""
    return [name for name, process in known.items() if not _alive(process)]


def usage(known: dict[str, psutil.Process]) -> dict[str, Usage]:
    """Measure each process, and the shared memory of all servers started by this process."""
    used: dict[str, Usage] = {}
    for name, process in known.items():
        with suppress(psutil.Error), process.oneshot():
            memory = process.memory_info().rss / 2**20
            used[name] = Usage(memory=memory, threads=process.num_threads(), files=process.num_fds())
    regions = [region.stat() for region in Path(SHARED_MEMORY).glob(f"imprompt_{os.getpid()}_*")]
    size = sum(region.st_blocks * 512 for region in regions) / 2**20
    used[SHARED_MEMORY] = Usage(memory=size, threads=0, files=len(regions))
    return used


def growth(before: dict[str, Usage], after: dict[str, Usage]) -> float:
    """Return the largest memory growth of any process, in MB."""
    return max((after[name].memory - before[name].memory for name in before if name in after), default=0.0)


def table(before: dict[str, Usage], after: dict[str, Usage]) -> Table:
    """Tabulate usage before and after side by side."""
    shown = Table(
        *("process", "MB before", "MB after", "threads before", "threads after", "files before", "files after"),
        title_justify="left",
    )
    for name, first in before.items():
        last = after.get(name)
        if last is not None:
            pairs = ((first.memory, last.memory), (first.threads, last.threads), (first.files, last.files))
            shown.add_row(name, *(f"{value:.0f}" for pair in pairs for value in pair))
    return shown


def _alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False
