"""Generate load: a fixed number of callers (closed loop), or requests at given times (open loop)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from imprompt import AsyncClient, ImpromptError, Overloaded
from imprompt_bench.results import Sample

Ask = Callable[[int, float | None], Awaitable[Sample]]
"""Sends the request with an index; the second argument is when it was due, or None for now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRequest:
    """A request to send: its arguments, its kind of traffic, and after how many seconds its caller cancels it."""

    arguments: dict[str, Any]
    kind: str = ""
    leaves_after: float | None = None
    metadata: tuple[tuple[str, str], ...] = ()
    """gRPC metadata. A client sends the same with every call, so each value gets its own client."""


def run(
    url: str, plan: Callable[[int], PlannedRequest], traffic: Callable[[Ask], Awaitable[list[Sample]]]
) -> list[Sample]:
    """Run `traffic` and return its samples. Refused requests are recorded as such and not retried."""

    async def measure() -> list[Sample]:
        async with AsyncExitStack() as stack:
            clients: dict[tuple[tuple[str, str], ...], AsyncClient] = {}
            began = time.perf_counter()

            async def ask(index: int, intended: float | None) -> Sample:
                planned = plan(index)
                client = clients.get(planned.metadata)
                if client is None:
                    client = clients[planned.metadata] = AsyncClient(url, max_retries=0, metadata=planned.metadata)
                    stack.push_async_exit(client)
                return await _ask(client, planned, index, intended, began)

            return await traffic(ask)

    return asyncio.run(measure())


async def closed_loop(ask: Ask, count: int, callers: int) -> list[Sample]:
    """Send `count` requests from `callers` callers, each of which waits for a result before its next request."""
    numbers = iter(range(count))

    async def caller() -> list[Sample]:
        return [await ask(index, None) for index in numbers]

    return [sample for own in await asyncio.gather(*(caller() for _ in range(callers))) for sample in own]


async def open_loop(ask: Ask, arrivals: Sequence[float]) -> list[Sample]:
    """Send a request at each of `arrivals` (seconds from now), no matter how many are still in progress."""
    began = time.perf_counter()

    async def arrival(index: int, at: float) -> Sample:
        await asyncio.sleep(began + at - time.perf_counter())
        return await ask(index, at)

    return await asyncio.gather(*(arrival(index, at) for index, at in enumerate(arrivals)))


async def _ask(
    client: AsyncClient, planned: PlannedRequest, index: int, intended: float | None, began: float
) -> Sample:
    sent = time.perf_counter() - began
    status, pictures, timings = "ok", 0, dict[str, float]()
    try:
        async with asyncio.timeout(planned.leaves_after):
            result = await client.generate(**planned.arguments)
        pictures, timings = len(result.images) or len(result.frames or ()), result.timings
    except Overloaded:
        status = "refused"
    except ImpromptError as error:
        status = type(error).__name__
    except TimeoutError:
        status = "left"
    return Sample(
        index=index,
        intended=sent if intended is None else intended,
        sent=sent,
        ended=time.perf_counter() - began,
        status=status,
        kind=planned.kind,
        pictures=pictures,
        timings=timings,
    )
