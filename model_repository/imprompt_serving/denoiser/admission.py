"""Admission to the queue: decide whether a job may join, and estimate how long it would wait."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from imprompt_serving.denoiser.policy import START_PATIENCE, rows_to_call
from imprompt_serving.errors import Overloaded
from imprompt_serving.specs import CallRows, Limits

SHORTEST_HINT_S, LONGEST_HINT_S = 0.5, 600.0
"""Bounds of the delay after which a refused client is told to retry."""


class Load(NamedTuple):
    """The work that a job still needs: `rows` per step, and `steps` (or UNet calls, where a step takes several).

    Jobs with the same `batch_key` can share a call.
    """

    rows: int
    steps: int
    batch_key: str = ""


def start_ticks(running: Sequence[Load], waiting: Sequence[Load], call_rows: CallRows) -> list[int]:
    """Estimate the tick at which each waiting job starts, if jobs start in order, each once a call has room for it.

    Where calls are padded, jobs that run together may take turns (`rows_to_call`), so a step takes more ticks.
    """
    limit = call_rows.most
    room, tick = limit - sum(min(load.rows, limit) for load in running), 0
    ends: list[tuple[int, int]] = []

    def start(load: Load) -> None:
        together, calls = min(limit - room, limit), load.steps * -(-load.rows // limit)
        ticks = -(-calls * together // rows_to_call(together, call_rows))
        heapq.heappush(ends, (tick + ticks, min(load.rows, limit)))

    for load in running:
        start(load)
    found = []
    for load in waiting:
        while ends and room < min(load.rows, limit):
            end, rows = heapq.heappop(ends)
            tick, room = max(tick, end), room + rows
        found.append(tick)
        room -= min(load.rows, limit)
        start(load)
    return found


def check_room(
    load: Load,
    running: Sequence[Load],
    waiting: Sequence[Load],
    *,
    call_rows: CallRows,
    tick_seconds: float,
    limits: Limits,
) -> None:
    """Check that `load` may join the queue. An empty queue accepts any job.

    Raises:
        Overloaded: too many rows are waiting, or the wait would be too long; the message says when to retry.
    """
    if not waiting:
        return
    rows = load.rows + sum(other.rows for other in waiting)
    seconds = _ticks_to_wait(load, running, waiting, call_rows) * tick_seconds
    if rows > limits.waiting_rows:
        # There is room again once enough jobs at the head of the queue have started.
        ticks = start_ticks(running, waiting, call_rows)
        excess, index = rows - limits.waiting_rows, 0
        while excess > 0 and index < len(waiting):
            excess -= waiting[index].rows
            index += 1
        raise Overloaded(
            f"the queue is full ({rows} rows would wait, the limit is {limits.waiting_rows}); "
            f"{_hint(ticks[index - 1] * tick_seconds)}",
            reason="rows",
        )
    if seconds > limits.waiting_seconds:
        raise Overloaded(
            f"the wait would be about {seconds:.0f} s, the limit is {limits.waiting_seconds:g} s; "
            f"{_hint(seconds - limits.waiting_seconds)}",
            reason="seconds",
        )


def _ticks_to_wait(load: Load, running: Sequence[Load], waiting: Sequence[Load], call_rows: CallRows) -> int:
    """Estimate the ticks until `load` starts. Batch keys take turns; those with running jobs go first for a while."""

    def alike(loads: Sequence[Load]) -> list[Load]:
        return [other for other in loads if other.batch_key == load.batch_key]

    keys = {other.batch_key for other in (*running, *waiting, load)}
    ticks = start_ticks(alike(running), [*alike(waiting), load], call_rows)[-1] * len(keys)
    return ticks if alike(running) or not running else max(ticks, START_PATIENCE)


def _hint(seconds: float) -> str:
    """Format the delay in the form that clients parse; it is part of the protocol."""
    return f"retry in {min(max(seconds, SHORTEST_HINT_S), LONGEST_HINT_S):.1f} s"
