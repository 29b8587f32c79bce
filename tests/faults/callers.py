"""Callers that request pictures one after the other, and what they see."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from imprompt import Client, ImpromptError, Progress

PAUSE_AFTER_ERROR_S = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """One request as its caller saw it; times are monotonic. `error` is empty if there was a picture."""

    retries: bool
    """Whether the client may resend it. It does not, once a stream has reported progress."""
    began: float
    ended: float
    error: str = ""
    progress: int = 0
    """Number of progress messages."""


class Callers:
    """Threads that make pictures one after the other, some as streams. Half of them retry, as clients do by default.

    Args:
        models: bundles to call, in turn.
        arguments: of every request.
    """

    def __init__(self, address: str, models: Sequence[str], *, count: int = 6, **arguments: Any) -> None:
        self.seen: list[Seen] = []
        self._address, self._arguments = address, arguments
        self.progress = False
        """Whether a stream has reported progress."""
        self._stop = threading.Event()
        self._running: dict[int, float] = {}
        self._threads = [
            threading.Thread(target=self._run, args=(i, models[i % len(models)]), daemon=True) for i in range(count)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def running(self) -> set[float]:
        """Return when each running request began."""
        return set(self._running.values())

    def stop(self, timeout: float = 180.0) -> int:
        """Let each caller finish its request; return how many still wait after `timeout` seconds."""
        self._stop.set()
        until = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0.0))
        return sum(thread.is_alive() for thread in self._threads)

    def pictures(self, since: float = 0.0) -> list[Seen]:
        """Return the requests that began after `since` and got a picture."""
        return [one for one in list(self.seen) if one.began >= since and not one.error]

    def errors(self, since: float = 0.0) -> Counter[str]:
        """Count the errors after `since`, of callers that do not retry and of streams that had reported progress."""
        seen = [one for one in list(self.seen) if one.ended > since and (not one.retries or one.progress)]
        return Counter(one.error for one in seen if one.error)

    def lost(self) -> list[str]:
        """Return the errors of requests that were resent, or could have been."""
        return [one.error for one in list(self.seen) if one.error and one.retries and not one.progress]

    def _run(self, index: int, model: str) -> None:
        retries = index % 2 == 0
        with Client(self._address, max_retries=4 if retries else 0) as client:
            while not self._stop.is_set():
                began, error, progress = time.monotonic(), "", 0
                self._running[index] = began
                # A new prompt each time, so that the response cache does not spare the text encoder.
                arguments: dict[str, Any] = {"model": model, "prompt": f"{index} {began}", **self._arguments}
                try:
                    if index % 4 < 2:
                        client.generate(**arguments)
                    else:
                        for event in client.stream(**arguments):
                            progress += isinstance(event, Progress)
                            self.progress = True
                except ImpromptError as caught:
                    error = f"{type(caught).__name__}: {caught}"
                ended = time.monotonic()
                self.seen.append(Seen(retries=retries, began=began, ended=ended, error=error, progress=progress))
                if error:
                    self._stop.wait(PAUSE_AFTER_ERROR_S)
