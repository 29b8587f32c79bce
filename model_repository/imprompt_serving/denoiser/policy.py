"""Which rows the next call computes: a pure function of what is there.

Every job has a tick at which it is due. The job that is due first leads: its key names the call, and others of that key
ride along as long as there are rows. Being served moves a job behind those that were not.

- A job begins when those of its key that have begun leave room in a call (``held`` says which do not). When there is
  more work than a call holds, pictures are then finished one after the other, instead of all of them late. Jobs of few
  rows do not wait for those of many, nor those of high priority for others.
- Nobody waits for ever: from the tick at which a job is due, whoever is served instead of it moves behind it, so that
  it waits for at most ``patience(...)`` ticks and one more for each other job that is there. One that has not begun
  lets those of other keys go first for a while.
- Work is conserved: no row of a call stays empty while a job of its key has one to compute.
- A job of many rows leaves half of a call to those of few.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

FIRST_PRIORITY, DEFAULT_PRIORITY, LAST_PRIORITY = 1, 5, 9
"""As with Triton's own request priorities, 1 goes first."""
PRIORITY_PATIENCE = 4
"""Ticks that a job lets others go first, for each level of priority that it is behind them."""
START_PATIENCE = 16
"""Ticks that a job which has not begun lets others go first: a good part of a job of usual size."""


class Candidate(NamedTuple):
    """A job as the policy sees it: rows of a step, and those of them that no call has computed yet.

    ``since`` is the tick that last served it, or that in which it came. A row of ``frames`` frames takes the place of
    as many rows of one.
    """

    key: Hashable
    rows: int
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
    order, waiting = _order(candidates), held(candidates, limit)
    leader = next(index for index in order if index not in waiting)
    riders = [index for index in order if candidates[index].key == candidates[leader].key]
    limit = _room(candidates[leader], limit)
    small = [i for i in riders if i not in (leader, *waiting) and candidates[i].pending <= limit // 2]
    riders.sort(key=lambda index: index in waiting)
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


def held(candidates: Sequence[Candidate], limit: int) -> set[int]:
    """Jobs that do not begin yet: those of their key that have begun, or begin before them, fill a call.

    Only jobs of at least their priority count, and of few rows if they have few, of many if they have many.
    """
    rows = Counter[Hashable]()
    waiting = set()
    # Those that have begun first: what they take is there before anybody begins.
    for index in sorted(_order(candidates), key=lambda i: not candidates[i].begun):
        candidate, room = candidates[index], _room(candidates[index], limit)
        crowd = (candidate.key, candidate.rows > room // 2)
        before = sum(rows[crowd, priority] for priority in range(FIRST_PRIORITY, candidate.priority + 1))
        if not candidate.begun and before >= room:
            waiting.add(index)
        else:
            rows[crowd, candidate.priority] += candidate.rows
    return waiting


def _order(candidates: Sequence[Candidate]) -> list[int]:
    return sorted(range(len(candidates)), key=lambda i: (_due(candidates[i]), candidates[i].pending, i))


def _due(candidate: Candidate) -> int:
    return candidate.since + patience(candidate)


def _room(candidate: Candidate, limit: int) -> int:
    """Rows like those of ``candidate`` that a call holds."""
    return max(limit // candidate.frames, 1)
