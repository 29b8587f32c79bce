"""Admission to the waiting line: whether a job may join it, and how long it would wait."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from imprompt_serving.denoiser.policy import START_PATIENCE, rows_to_call
from imprompt_serving.errors import Overloaded
from imprompt_serving.specs import CallRows, Limits

LONGEST_HINT_S, SHORTEST_HINT_S = 600.0, 0.5


class Load(NamedTuple):
    """What a job still needs: rows in each step, and steps (calls of the UNet, to be exact).

    Jobs of one `batch_key` can share a call.
    """

    rows: int
    steps: int
    batch_key: str = ""


def starts(running: Sequence[Load], waiting: Sequence[Load], call_rows: CallRows) -> list[int]:
    """The tick at which each waiting job begins if they begin in their order, as soon as a call has room for them.

    Where calls are padded, jobs that run together may take turns (`rows_to_call`), so that a step takes more ticks.
    """
    limit = call_rows.most
    room, tick = limit - sum(min(load.rows, limit) for load in running), 0
    ends: list[tuple[int, int]] = []

    def begin(load: Load) -> None:
        together, calls = min(limit - room, limit), load.steps * -(-load.rows // limit)
        ticks = -(-calls * together // rows_to_call(together, call_rows))
        heapq.heappush(ends, (tick + ticks, min(load.rows, limit)))

    for load in running:
        begin(load)
    begins = []
    for load in waiting:
        while ends and room < min(load.rows, limit):
            end, rows = heapq.heappop(ends)
            tick, room = max(tick, end), room + rows
        begins.append(tick)
        room -= min(load.rows, limit)
        begin(load)
    return begins


def check_room(
    load: Load,
    running: Sequence[Load],
    waiting: Sequence[Load],
    *,
    call_rows: CallRows,
    tick_seconds: float,
    limits: Limits,
) -> None:
    """Whether ``load`` may join; anything may when nobody waits.

    Raises:
        Overloaded: too many rows wait, or they would for too long; the message says when to come back.
    """
    if not waiting:
        return
    rows = load.rows + sum(other.rows for other in waiting)
    seconds = _ticks_to_wait(load, running, waiting, call_rows) * tick_seconds
    if rows > limits.waiting_rows:
        # Room comes when the first ones in the line have begun.
        begins = starts(running, waiting, call_rows)
        excess, index = rows - limits.waiting_rows, 0
        while excess > 0 and index < len(waiting):
            excess -= waiting[index].rows
            index += 1
        raise Overloaded(
            f"{rows} rows would wait, at most {limits.waiting_rows} may; {_hint(begins[index - 1] * tick_seconds)}",
            reason="rows",
        )
    if seconds > limits.waiting_seconds:
        raise Overloaded(
            f"about {seconds:.0f} seconds to wait, at most {limits.waiting_seconds:g} are allowed; "
            f"{_hint(seconds - limits.waiting_seconds)}",
            reason="seconds",
        )


def _ticks_to_wait(load: Load, running: Sequence[Load], waiting: Sequence[Load], call_rows: CallRows) -> int:
    """Ticks until ``load`` begins: those of its shape take turns with the other shapes, which go first for a while."""

    def alike(loads: Sequence[Load]) -> list[Load]:
        return [other for other in loads if other.batch_key == load.batch_key]

    keys = {other.batch_key for other in (*running, *waiting, load)}
    ticks = starts(alike(running), [*alike(waiting), load], call_rows)[-1] * len(keys)
    return ticks if alike(running) or not running else max(ticks, START_PATIENCE)


def _hint(seconds: float) -> str:
    """What clients read; the form is part of the protocol."""
    return f"retry in {min(max(seconds, SHORTEST_HINT_S), LONGEST_HINT_S):.1f} s"
