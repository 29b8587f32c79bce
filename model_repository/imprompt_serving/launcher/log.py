"""The output of Triton and its models."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections import deque
from contextlib import suppress
from typing import TextIO

TAIL_LINES = 200

# Log lines of Triton to suppress: no GPU found; shutdown (see `EXIT_TIMEOUT_S`); or a coroutine of a model that
# finished before Triton registered it.
HARMLESS = re.compile(
    r"Unable to allocate pinned system memory|CudaDriverHelper has not been initialized|DCGM unable to start"
    r"|Failed to initialize NVML|^Signal \(\d+\) received|Exit timeout expired|^\s*$"
    r"|Cannot remove future from background"
)
# Captures the first line of the reason. Triton logs the traceback on the same line, with escaped line breaks.
LOAD_FAILURE = re.compile(r"failed to load '(?P<model>[^']+)' version \d+: (?:Internal: )?(?P<reason>.+?)(?:\\n|\"?$)")


class Log:
    """Holds back the output until released, then passes it on. Error messages quote its end."""

    def __init__(self, sink: TextIO | None, *, verbose: bool) -> None:
        self._sink = sink
        self._verbose = verbose
        self._pass_on = verbose
        self._lines: deque[str] = deque(maxlen=TAIL_LINES)
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
