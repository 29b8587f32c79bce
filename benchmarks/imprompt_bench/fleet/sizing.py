"""How many members does a load need: `imprompt bench size`."""

from __future__ import annotations

from collections.abc import Iterator

from imprompt_bench.fleet.engine import Engine
from imprompt_bench.fleet.policies import POLICIES
from imprompt_bench.fleet.simulation import Outcome, Setup, capacity, seconds_alone, simulate
from imprompt_bench.fleet.traffic import Kind
from imprompt_bench.results import BenchError
from imprompt_serving.specs import CallRows

ROUTING = "least requests, 8 draws"
"""What the configuration of Envoy in `deploy` does."""
REQUESTS = 3000
"""Requests per simulation, so that the p99 rests on the slowest 30 or so."""


def answers(
    engine: Engine,
    *,
    rate: float,
    p99: float,
    mix: tuple[Kind, ...],
    steps: int,
    call_rows: CallRows,
    arrivals: str = "poisson",
    envoys: int = 2,
) -> Iterator[tuple[int, Outcome]]:
    """Yield numbers of members and their outcomes; the last is the smallest that serves `rate` within `p99`.

    Args:
        rate: pictures per second; a clip counts as one.
        p99: seconds that 99 % of the requests may take; none may be refused.

    Raises:
        BenchError: requests take longer even on a server of their own.
    """
    alone = [(seconds_alone(engine, kind, steps, call_rows), kind) for kind in mix]
    late = sum(kind.share for seconds, kind in alone if seconds > p99) / sum(kind.share for kind in mix)
    if late > 0.01:
        longest, kind = max(alone)
        raise BenchError(f"a request ({kind.name}) takes {longest:.2f} s on a server of its own, with {steps} steps")
    requests = rate * sum(kind.share for kind in mix) / sum(kind.share * kind.pictures for kind in mix)

    def outcome(members: int) -> Outcome:
        return simulate(
            Setup(
                engine=engine,
                members=members,
                policy=POLICIES[ROUTING],
                rate=requests,
                seconds=REQUESTS / requests,
                envoys=envoys,
                arrivals=arrivals,
                mix=mix,
                steps=steps,
                call_rows=call_rows,
            )
        )

    def enough(found: Outcome) -> bool:
        return not found.refused and found.percentile(99) <= p99

    # Fewer cannot compute that many rows.
    low = int(requests / capacity(engine, mix, steps, call_rows))
    high = low + 1
    while not enough(found := outcome(high)):
        yield high, found
        low, high = high, high + max(high // 4, 1)
    best = high, found
    while high - low > 1:
        middle = (low + high) // 2
        found = outcome(middle)
        if enough(found):
            high, best = middle, (middle, found)
        else:
            low = middle
            yield middle, found
    yield best
