"""Which rows the next call computes: a pure function of what is there.

Every job has a tick at which it is due. The job that is due first leads: its key names the call, and others of that key
ride along as long as there are rows. Being served moves a job behind those that were not.

- Nobody waits for ever: from the tick at which a job is due, whoever is served instead of it moves behind it, so that
  it waits for at most ``patience(...)`` ticks and one more for each other job that is there.
- Work is conserved: no row of a call stays empty while a job of its key has one to compute.
- A job that has not begun lets those that have go first for a while. When there is more work than a call holds,
  pictures are then finished one after the other, instead of all of them late.
- A job of many rows leaves half of a call to those of few.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

FIRST_PRIORITY, DEFAULT_PRIORITY, LAST_PRIORITY = 1, 5, 9
"""As with Triton's own request priorities, 1 goes first."""
PRIORITY_PATIENCE = 4
"""Ticks that a job lets others go first, for each level of priority that it is behind them."""
START_PATIENCE = 32
"""Ticks that a job which has not begun lets others go first: about the length of a job of usual size."""


class Candidate(NamedTuple):
    """A job as the policy sees it. ``since`` is the tick that last served it, or that in which it came.

    A row of ``frames`` frames takes the place of as many rows of one.
    """

    key: Hashable
    pending: int
    since: int
    begun: bool
    priority: int = DEFAULT_PRIORITY
    frames: int = 1


class Share(NamedTuple):
    """Rows of the next call for the candidate at ``index``."""

    index: int  # type: ignore[assignment]  # hides tuple.index
    rows: int


def patience(candidate: Candidate) -> int:
    """Ticks from ``since`` to the one at which ``candidate`` is due."""
    waits = PRIORITY_PATIENCE * (candidate.priority - FIRST_PRIORITY)
    return waits if candidate.begun else waits + START_PATIENCE


def plan(candidates: Sequence[Candidate], limit: int) -> list[Share]:
    """Rows for the next call, all of one key and at most ``limit`` frames in all, or a single row.

    Jobs that are due at the same tick are ordered by their rows, the smaller first, then as in ``candidates``.
    """
    if not candidates:
        return []
    order = sorted(range(len(candidates)), key=lambda i: (_due(candidates[i]), candidates[i].pending, i))
    leader = order[0]
    limit = max(limit // candidates[leader].frames, 1)
    riders = [index for index in order if candidates[index].key == candidates[leader].key]
    small = [index for index in riders[1:] if candidates[index].pending <= limit // 2]
    rows = {leader: min(candidates[leader].pending, limit - limit // 2 if small else limit)}
    room = limit - rows[leader]
    for index in (*small, *riders):
        if not room:
            break
        given = rows.get(index, 0)
        more = min(candidates[index].pending - given, room)
        if more:
            rows[index] = given + more
            room -= more
    return [Share(index, given) for index, given in rows.items()]


def _due(candidate: Candidate) -> int:
    return candidate.since + patience(candidate)
