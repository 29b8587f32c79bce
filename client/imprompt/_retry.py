"""Timeouts and retries: how long a call may take, and how often it is resent to an overloaded or restarting server."""

from __future__ import annotations

import numbers
import random
import time
from collections.abc import Iterator

from imprompt._errors import ConnectionFailed, DeadlineExceeded, Overloaded, invalid, short_repr
from imprompt._tensors import is_number

MAX_RETRIES = 4
FIRST_DELAY_S = 0.5
"""Doubles with every retry. If the server suggests a longer delay, that one is used."""
MAX_DELAY_S = 30.0
"""If the server suggests a longer delay, the call fails, unless the caller's `timeout` leaves enough time."""
JITTER = 0.25
"""Random extra delay, up to this fraction, so that clients refused together do not retry together."""
RESTART_S = 120.0
"""How long to wait for a server that has answered before and no longer does: `imprompt serve` restarts a failed one."""
RECONNECT_S = 0.5
"""Seconds between checks whether a lost server is back."""
GRACE_S = 2.0
"""How long after the caller's deadline gRPC's own deadline falls, so that the server can respond first."""
CONTROL_TIMEOUT_S = 30.0
"""Upper limit for calls that the server answers without running a model."""
PROBE_TIMEOUT_S = 2.0
"""Timeout for checking whether a server responds at all."""
_FOREVER_S = 1e9
"""Timeouts from here on mean no limit; gRPC's clock overflows not far above."""


def check_timeout(value: object) -> float | None:
    """Validate a timeout in seconds; None and infinity mean no limit."""
    if value is None:
        return None
    if not is_number(value) or not value > 0:
        raise invalid("timeout", f"must be a number of seconds above 0; got {short_repr(value)}")
    return float(value) if value < _FOREVER_S else None


def check_retries(value: object) -> int:
    """Validate how often a request may be resent."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 0:
        raise invalid("max_retries", f"must be an integer, 0 or more; got {short_repr(value)}")
    return int(value)


class Budget:
    """The time and the attempts that remain for one call."""

    def __init__(self, max_retries: int, timeout: float | None) -> None:
        self._retries_left, self._delay = max_retries, FIRST_DELAY_S
        self.timeout = timeout
        self._end = None if timeout is None else time.monotonic() + timeout

    @property
    def remaining(self) -> float | None:
        """Seconds left; None if there is no limit.

        Raises:
            DeadlineExceeded: the caller's timeout has passed.
        """
        if self.expired:
            raise self.deadline_error()
        return self._left

    @property
    def _left(self) -> float | None:
        return None if self._end is None else self._end - time.monotonic()

    @property
    def grpc_timeout(self) -> float | None:
        """Timeout for gRPC, in seconds from now."""
        return None if self._left is None else self._left + GRACE_S

    @property
    def control_timeout(self) -> float:
        """Timeout for a control call, in seconds from now."""
        left = self.remaining
        return CONTROL_TIMEOUT_S if left is None else min(CONTROL_TIMEOUT_S, left)

    @property
    def expired(self) -> bool:
        """Whether the caller's timeout has passed."""
        return self._left is not None and self._left <= 0

    def deadline_error(self, request_id: str | None = None) -> DeadlineExceeded:
        """Build the error for a call whose timeout has passed."""
        return DeadlineExceeded(f"timeout: no result within {self.timeout:g} s", request_id=request_id)

    def backoff(self, error: Overloaded) -> float:
        """Use up one retry and return how many seconds to wait before it.

        Raises:
            Overloaded: `error` itself, if no retry or too little time is left, or the server asks for too long a delay.
        """
        hint = error.retry_after or 0.0
        left = self._left
        if not self._retries_left or (left is None and hint > MAX_DELAY_S):
            raise error
        delay = max(hint, min(self._delay, MAX_DELAY_S)) * (1 + JITTER * random.random())
        if left is not None and delay >= left:
            raise error
        self._retries_left -= 1
        self._delay *= 2
        return delay

    def reconnects(self, error: ConnectionFailed) -> Iterator[float]:
        """Use up one retry, because the request may have been at fault, and yield pauses between looks for the server.

        Raises:
            ConnectionFailed: `error` itself, if no retry or no time is left, or the server stays away for too long.
        """
        until = time.monotonic() + RESTART_S
        if not self._retries_left:
            raise error
        self._retries_left -= 1
        while time.monotonic() < until and not self.expired:
            yield RECONNECT_S * (1 + JITTER * random.random())
        raise error
