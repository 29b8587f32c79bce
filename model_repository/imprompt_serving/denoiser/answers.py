"""Call the callbacks of jobs on separate threads, so that a slow receiver blocks neither the loop nor other jobs."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue

from torch import Tensor

from imprompt_serving.denoiser.meter import Meter
from imprompt_serving.denoiser.protocol import LoopJob
from imprompt_serving.errors import Cancelled, RequestError, unexpected

logger = logging.getLogger(__name__)

THREADS = 4
SEND_LIMIT_S = 10.0
"""If a send takes longer, another thread takes over; the stuck thread ends when its send does."""
_MAX_REPLACED = 64


class Listener:
    """Callbacks for one job: any number of `progress`, then exactly one of `finish` or `fail`.

    They are called in order, never on the loop's thread. `progress` receives the number of finished steps, the total
    number of steps, and the clean latents that the last step predicted if the job wants a preview.
    """

    def __init__(
        self,
        progress: Callable[[int, int, Tensor | None], None],
        finish: Callable[[LoopJob], None],
        fail: Callable[[RequestError], None],
    ) -> None:
        self.progress, self.finish, self.fail = progress, finish, fail


class Outcome(Listener):
    """Lets a thread wait for the job to end: sets `ended`, and `error` if the job failed."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.error: RequestError | None = None
        super().__init__(lambda *_: None, lambda _: self.ended.set(), self._failed)

    def _failed(self, error: RequestError) -> None:
        self.error = error
        self.ended.set()


class Answers:
    """Calls the listener of one job on `threads`. All methods return at once."""

    def __init__(self, listener: Listener, threads: AnswerThreads, meter: Meter) -> None:
        self._listener, self._threads, self._meter = listener, threads, meter
        self._channel = Channel()

    def progress(self, step: int, steps: int, preview: Tensor | None, on_error: Callable[[Exception], None]) -> None:
        """Report a step. If the listener raises, `on_error` gets the exception."""
        # A preview may take longer than a tick. Skip it while another answer is on its way, or previews would pile up.
        preview = None if self._channel.scheduled else preview
        self._send(self._progress, step, steps, preview, on_error)

    def finish(self, job: LoopJob) -> None:
        self._send(self._finish, job)

    def fail(self, error: RequestError) -> None:
        self._send(self._fail, error)

    def _send(self, call: Callable[..., None], *arguments: object) -> None:
        self._threads.send(self._channel, partial(call, *arguments))

    def _progress(self, step: int, steps: int, preview: Tensor | None, on_error: Callable[[Exception], None]) -> None:
        try:
            self._listener.progress(step, steps, preview)
        except Exception as error:
            on_error(error)

    def _finish(self, job: LoopJob) -> None:
        try:
            self._listener.finish(job)
            self._meter.ended("finished")
        except RequestError as error:
            self._fail(error)
        except Exception as error:
            logger.exception("could not deliver the result of job %s", job.id)
            self._fail(unexpected(error))

    def _fail(self, error: RequestError) -> None:
        self._meter.ended("cancelled" if isinstance(error, Cancelled) else "failed")
        try:
            self._listener.fail(error)
        except Exception:
            logger.exception("could not deliver the error of a job: %s", error)


class Channel:
    """The queued answers of one job, sent in order and one at a time."""

    def __init__(self) -> None:
        self.calls: deque[Callable[[], None]] = deque()
        self.scheduled = False


class AnswerThreads:
    """Calls the functions passed to `send` on several threads; calls of the same channel never overlap."""

    def __init__(self, threads: int = THREADS, send_limit: float = SEND_LIMIT_S) -> None:
        self._send_limit = send_limit
        self._ready: SimpleQueue[Channel | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._sending: dict[threading.Thread, float] = {}
        self._replaced: set[threading.Thread] = set()
        self._threads = [self._start() for _ in range(threads)]

    def send(self, channel: Channel, call: Callable[[], None]) -> None:
        """Queue `call` behind earlier calls of `channel`, and return at once."""
        with self._lock:
            self._replace_stuck()
            channel.calls.append(call)
            if channel.scheduled:
                return
            channel.scheduled = True
        self._ready.put(channel)

    def close(self, timeout: float | None = None) -> None:
        """Send what is queued, then end the threads. Wait at most `timeout` seconds for them."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            working = [thread for thread in self._threads if thread not in self._replaced]
        for _ in working:
            self._ready.put(None)
        for thread in working:
            thread.join(None if deadline is None else max(deadline - time.monotonic(), 0.0))

    def _start(self) -> threading.Thread:
        # A daemon thread, because a send that hangs must not keep the process alive.
        thread = threading.Thread(target=self._work, name="answers", daemon=True)
        thread.start()
        return thread

    def _work(self) -> None:
        this = threading.current_thread()
        while (channel := self._ready.get()) is not None:
            while (call := self._next(channel, this)) is not None:
                try:
                    call()
                except Exception:
                    logger.exception("could not send an answer")
                del call  # it may hold the last reference to a finished job
            del channel
            with self._lock:
                if this in self._replaced:
                    self._replaced.discard(this)
                    self._threads.remove(this)
                    return

    def _next(self, channel: Channel, thread: threading.Thread) -> Callable[[], None] | None:
        """Return the next call of `channel`, for `thread` to make now, or None if there are no more."""
        with self._lock:
            self._sending.pop(thread, None)
            if not channel.calls:
                channel.scheduled = False
                return None
            self._sending[thread] = time.monotonic()
            return channel.calls.popleft()

    def _replace_stuck(self) -> None:
        """Start another thread for each one whose send takes too long. The caller holds the lock."""
        latest = time.monotonic() - self._send_limit
        for thread, began in self._sending.items():
            if began < latest and thread not in self._replaced and len(self._replaced) < _MAX_REPLACED:
                logger.error("an answer has been blocked for more than %g s", self._send_limit)
                self._replaced.add(thread)
                self._threads.append(self._start())
