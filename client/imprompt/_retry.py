"""How often and how long a call is tried: the time its caller gave, and retries when the server is full."""

from __future__ import annotations

import numbers
import random
import time

from imprompt._errors import DeadlineExceeded, Overloaded, invalid, shown
from imprompt._tensors import is_number

MAX_RETRIES = 4
FIRST_DELAY_S = 0.5
"""Doubles with every retry; the server's own hint is used when it is longer."""
MAX_DELAY_S = 30.0
"""A server that asks for more is not waited for, unless the caller's `timeout` leaves time for it."""
JITTER = 0.25
"""Up to this share is added, so that callers that were refused together do not come back together."""
GRACE_S = 2.0
"""gRPC's deadline comes this much after the caller's: the server's own answer should come first."""
QUESTION_TIMEOUT_S = 30.0
"""At most, for what a server answers without work."""
PROBE_TIMEOUT_S = 2.0
"""For the question whether somebody is there at all."""
_FOREVER_S = 1e9
"""As good as no limit; the clocks of gRPC end a little after."""


def check_timeout(value: object) -> float | None:
    """Seconds; None (or infinity) for no limit."""
    if value is None:
        return None
    if not is_number(value) or not value > 0:
        raise invalid("timeout", f"seconds, more than 0; got {shown(value)}")
    return float(value) if value < _FOREVER_S else None


def check_retries(value: object) -> int:
    """How often a request may be sent again."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 0:
        raise invalid("max_retries", f"a whole number, 0 or more; got {shown(value)}")
    return int(value)


class Budget:
    """The attempts and the time that one call has."""

    def __init__(self, max_retries: int, timeout: float | None) -> None:
        self._retries_left, self._delay = max_retries, FIRST_DELAY_S
        self.timeout = timeout
        self._end = None if timeout is None else time.monotonic() + timeout

    @property
    def remaining(self) -> float | None:
        """Seconds that are left; None without a limit.

        Raises:
            DeadlineExceeded: none are.
        """
        if self.late:
            raise self.over()
        return self._left

    @property
    def _left(self) -> float | None:
        return None if self._end is None else self._end - time.monotonic()

    @property
    def grpc_timeout(self) -> float | None:
        """Deadline of the call itself, in seconds from now."""
        return None if self._left is None else self._left + GRACE_S

    @property
    def question_timeout(self) -> float:
        """Deadline of a small question, in seconds from now."""
        left = self.remaining
        return QUESTION_TIMEOUT_S if left is None else min(QUESTION_TIMEOUT_S, left)

    @property
    def late(self) -> bool:
        """Whether the caller's time is over."""
        return self._left is not None and self._left <= 0

    def over(self, request_id: str | None = None) -> DeadlineExceeded:
        """The error for a caller whose time is over."""
        return DeadlineExceeded(f"timeout: {self.timeout:g} seconds are over", request_id=request_id)

    def pause(self, error: Overloaded) -> float:
        """Seconds to wait after `error` before the next attempt.

        Raises:
            Overloaded: `error`, when no attempt or not enough time is left, or the server asks for too long a wait.
        """
        hint = error.retry_after or 0.0
        left = self._left
        if not self._retries_left or (left is None and hint > MAX_DELAY_S):
            raise error
        pause = max(hint, min(self._delay, MAX_DELAY_S)) * (1 + JITTER * random.random())
        if left is not None and pause >= left:
            raise error
        self._retries_left -= 1
        self._delay *= 2
        return pause
