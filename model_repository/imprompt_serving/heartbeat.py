"""Heartbeats: what each model process is waiting for, in a file that the launcher's watchdog reads.

A heartbeat does not pass through Triton, so it also works while Triton hangs. Times are in monotonic seconds, which all
processes of a machine share. Without the launcher, nothing is written.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

FOLDER_VARIABLE = "IMPROMPT_HEARTBEATS"
INTERVAL_S = 0.5
BYTES = 4096
"""Size of the file, written once at the start: later writes must not need space, because the disk may be full."""
CANARY_PARAMETER = "imprompt_canary"
"""Parameter of a request that makes it a canary; its value is the secret of this server (`triton.internal`)."""


class Pulse(msgspec.Struct, frozen=True, kw_only=True):
    """The state of a model process."""

    at: float
    """When this was written."""
    loaded: bool = False
    """Whether the model has finished loading."""
    calls: dict[str, float] = {}
    """The models that this process is waiting for: when the oldest call began, or the latest call ended if later."""
    sending: float | None = None
    """When the oldest response began that is still being sent."""
    canary: float | None = None
    """When the oldest canary arrived that has not been answered."""
    picture: float | None = None
    """When the last picture went to a caller."""


class InProgress:
    """The start times of operations in progress. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._starts: dict[object, float] = {}
        self._latest_end = 0.0

    def begin(self) -> object:
        """Start an operation; pass the result to `end`."""
        operation = object()
        with self._lock:
            self._starts[operation] = time.monotonic()
        return operation

    def end(self, operation: object) -> None:
        """End an operation. Ending it twice is allowed."""
        with self._lock:
            if self._starts.pop(operation, None) is not None:
                self._latest_end = time.monotonic()

    @contextmanager
    def one(self) -> Iterator[None]:
        operation = self.begin()
        try:
            yield
        finally:
            self.end(operation)

    def oldest(self) -> float | None:
        """Return when the oldest operation began; None if there is none."""
        with self._lock:
            return min(self._starts.values(), default=None)

    def waiting(self) -> float | None:
        """Return since when operations are in progress and none has ended; None if there are none."""
        oldest = self.oldest()
        return None if oldest is None else max(oldest, self._latest_end)


class Heart:
    """Writes the heartbeat of the process that hosts the model instance `name`, regularly once it is loaded."""

    def __init__(self, name: str) -> None:
        self.sending, self.canary = InProgress(), InProgress()
        self._calls: dict[str, InProgress] = {}
        self._loaded, self._closed = False, threading.Event()
        self._picture: float | None = None
        folder = os.environ.get(FOLDER_VARIABLE)
        self._memory = _map(Path(folder) / name) if folder else None
        self._write()

    def call(self, model: str) -> Any:
        """Return a context to wait in for a response of `model`."""
        return self._calls.setdefault(model, InProgress()).one()

    def loaded(self) -> None:
        """Record that the model has been loaded, and keep writing from now on.

        No thread runs before: it would compete for the GIL with Triton's, which on a busy machine aborts if a process
        that loads a model does not answer for a second.
        """
        self._loaded = True
        self._write()
        if self._memory is not None:
            threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def sent_picture(self) -> None:
        self._picture = time.monotonic()

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(INTERVAL_S):
            self._write()

    def _write(self) -> None:
        if self._memory is not None:
            text = msgspec.json.encode(self._pulse())
            self._memory[:] = text[:BYTES].ljust(BYTES)

    def _pulse(self) -> Pulse:
        calls = {model: calls.waiting() for model, calls in list(self._calls.items())}
        return Pulse(
            at=time.monotonic(),
            loaded=self._loaded,
            calls={model: since for model, since in calls.items() if since is not None},
            sending=self.sending.oldest(),
            canary=self.canary.oldest(),
            picture=self._picture,
        )


def read_pulses(folder: Path) -> dict[str, Pulse]:
    """Read the heartbeats in `folder`, by instance. A heartbeat that is just being written is left out."""
    pulses = {}
    for file in folder.iterdir():
        try:
            pulses[file.name] = msgspec.json.decode(file.read_bytes(), type=Pulse)
        except (OSError, msgspec.MsgspecError):
            continue
    return pulses


def model_of(instance: str) -> str:
    """Return the model of an instance, which Triton names `MODEL_GROUP_NUMBER`."""
    return instance.rsplit("_", 2)[0]


def _map(file: Path) -> mmap.mmap:
    file.write_bytes(b" " * BYTES)
    with file.open("r+b") as opened:
        return mmap.mmap(opened.fileno(), BYTES)
