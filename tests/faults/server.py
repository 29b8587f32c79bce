"""`imprompt serve` in a separate process, whose processes can be killed or stopped."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

START_TIMEOUT_S = 600.0
FAILURE = re.compile(r"imprompt: (?P<reason>.*); restarting in ")
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Wait until `condition` returns something true, and return that."""
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, f"{what}: not within {seconds:g} s"
        time.sleep(0.05)
    return found


def pick(repository: Path, bundle: str, folder: Path) -> Path:
    """Make a repository with only the models of `bundle`, as links."""
    folder.mkdir(parents=True, exist_ok=True)
    for owner in repository.glob("*/1/owner"):
        link = folder / owner.parents[1].name
        if owner.read_text().strip() == bundle and not link.exists():
            link.symlink_to(owner.parents[1].resolve())
    return folder


def modified(repository: Path, folder: Path, change: Callable[[str, str], str]) -> Path:
    """Make a repository with other `model.py`: `change` gets the name of a model and the text of its file."""
    for model in repository.iterdir():
        version = folder / model.name / "1"
        version.mkdir(parents=True)
        (version.parent / "config.pbtxt").symlink_to((model / "config.pbtxt").resolve())
        for file in (model / "1").iterdir():
            if file.name not in ("model.py", "__pycache__"):
                (version / file.name).symlink_to(file.resolve())
        (version / "model.py").write_text(change(model.name, (model / "1/model.py").read_text()))
    return folder


class Foreground:
    """`imprompt serve` on free ports, with a health port. Leaving the context ends it."""

    def __init__(self, repository: Path, *options: str, wrapper: Sequence[str] = (), **environment: str) -> None:
        self.repository = repository
        command = Path(sys.executable).with_name("imprompt")
        ports = ("--grpc-port", "0", "--metrics-port", "0", "--health-port", "0")
        self.lines: list[tuple[float, str]] = []
        self.process = subprocess.Popen(
            [*wrapper, str(command), "serve", str(repository), *ports, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=os.environ | environment,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.process.terminate()
        try:
            self.process.wait(45)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(5)

    def wait_until_ready(self) -> Self:
        def line() -> str | None:
            assert self.process.poll() is None, self.output()
            return self._find(r"^ready .*")

        addresses = wait_for(line, START_TIMEOUT_S, "the server is ready")
        self.addresses = dict(part.split("=") for part in addresses.split()[1:])
        return self

    def output(self) -> str:
        return "".join(line for _, line in self.lines)

    def said(self, pattern: str, since: float) -> float | None:
        """Return when a line with `pattern` was printed after `since` (monotonic)."""
        return next((at for at, line in list(self.lines) if at >= since and re.search(pattern, line)), None)

    def line_with(self, text: str) -> str | None:
        """Return the first line that contains `text`."""
        return next((line for _, line in list(self.lines) if text in line), None)

    def failure(self, since: float) -> tuple[float, str] | None:
        """Return when the launcher noticed a failure after `since` (monotonic), and its reason."""
        for at, line in list(self.lines):
            match = FAILURE.search(line)
            if match and at >= since:
                return at, match["reason"]
        return None

    @property
    def launcher(self) -> psutil.Process:
        """The process of `imprompt serve`: a child if a wrapper runs it."""
        process = psutil.Process(self.process.pid)
        return next((p for p in [process, *process.children(recursive=True)] if "serve" in p.cmdline()[1:4]), process)

    def processes(self) -> dict[str, psutil.Process]:
        """Return `tritonserver` and the processes of models, by name."""
        found = {}
        for process in self.launcher.children(recursive=True):
            try:
                arguments = process.cmdline()
            except psutil.NoSuchProcess:
                continue
            if arguments and arguments[0].endswith("tritonserver"):
                found["tritonserver"] = process
            elif arguments and arguments[0].endswith("triton_python_backend_stub"):
                found[Path(arguments[1]).parent.parent.name] = process
        return found

    def health(self, path: str = "/readyz") -> tuple[int, dict[str, Any]]:
        try:
            with _OPENER.open(f"http://{self.addresses['health']}{path}", timeout=5) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def leftovers(self) -> list[Path]:
        """List the shared memory regions of this server."""
        return list(Path("/dev/shm").glob(f"imprompt_{self.launcher.pid}_*"))

    def _find(self, pattern: str) -> str | None:
        return next((line for _, line in list(self.lines) if re.search(pattern, line)), None)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line))
