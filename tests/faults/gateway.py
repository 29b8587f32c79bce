"""A gateway that dies or hangs beside its server, while callers request pictures over HTTP."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

from faults.cases import Inject, Outcome
from faults.known import KnownPictures, RetryingCallers
from faults.server import Foreground, wait_for
from faults.soak import NOTICE_LIMIT_S, gateway_failure

HTTP_LIMIT_S = 120.0


def failed_gateway(name: str, inject: Inject, repository: Path, bundle: str) -> Outcome:
    """Inject a fault into the gateway; `seen` counts how often callers had to send their requests again."""
    with Foreground(repository, "--gateway-port", "0") as server:
        server.wait_until_ready()
        address = server.addresses["grpc"]
        callers = RetryingCallers(KnownPictures(address, bundle), address, server.addresses["gateway"], count=6, seed=0)
        wait_for(lambda: callers.tally.pictures >= 12, 120, "pictures before the fault")
        began = time.monotonic()
        with ExitStack() as held:
            inject(server, held)
        noticed = wait_for(lambda: gateway_failure(server, began), NOTICE_LIMIT_S, f"{name}: noticed")
        wait_for(lambda: _answers(callers), HTTP_LIMIT_S, f"{name}: pictures again")
        pictures = time.monotonic() - began
        unanswered = callers.stop()
        return Outcome(
            case=name,
            noticed=noticed - began,
            reason="",
            pictures=pictures,
            seen=dict(callers.tally.resent),
            lost=callers.tally.lost + callers.tally.wrong,
            unanswered=unanswered,
        )


def _answers(callers: RetryingCallers) -> bool:
    try:
        callers.over_http("text")
    except OSError:
        return False
    return True
