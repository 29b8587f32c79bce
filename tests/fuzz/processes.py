"""What a server holds: memory, threads and file descriptors of each of its processes, and shared memory."""

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
    """Of one process; of `/dev/shm`, where `files` counts regions. Memory is resident, in MB."""

    memory: float
    threads: int
    files: int


def processes(server: Server) -> dict[str, psutil.Process]:
    """The processes of `server` by name."""
    return {name: psutil.Process(pid) for name, pid in {"tritonserver": server.pid, **server.stub_pids}.items()}


def ended(known: dict[str, psutil.Process]) -> list[str]:
    """Names of those that ended, or whose number another process has by now."""
    return [name for name, process in known.items() if not _alive(process)]


def usage(known: dict[str, psutil.Process]) -> dict[str, Usage]:
    """What each holds now, and the shared memory of servers of this process."""
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
    """MB by which the process grew that grew most."""
    return max((after[name].memory - before[name].memory for name in before if name in after), default=0.0)


def table(before: dict[str, Usage], after: dict[str, Usage]) -> Table:
    """Both, side by side."""
    shown = Table(
        "process", "MB before", "after", "threads before", "after", "files before", "after", title_justify="left"
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
