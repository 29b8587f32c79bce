"""Decide which rows the next call of the UNet computes, as a pure function of the jobs.

Every job has a tick at which it is due. The job that is due first leads: its batch key determines the call, and other
jobs with that key fill the remaining rows. Serving a job moves it behind those that were not served.

- A job starts when the running jobs with its key leave room in a call (`not_yet_startable` returns those that must
  wait). Under load, pictures then finish one after the other instead of all late. Small jobs do not wait for large
  ones, and jobs of high priority do not wait for others.
- No job starves. Once a job is due, every job that is served instead moves behind it, so it waits at most
  `patience(...)` ticks plus one tick (with LoRAs, one turn) for each other job. A job that has not started lets other
  keys go first for a while.
- No row of a call stays empty while a job with its key has rows to compute. Where calls are padded, rows that would
  spill into the next bucket may be left to the next call (`rows_to_call`).
- Switching LoRAs takes time, so jobs with other LoRAs than the last call wait until its LoRAs have had their turn
  (`Turn`).
- A large job leaves half of a call to small ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple

from imprompt_serving.specs import CallRows

FIRST_PRIORITY, DEFAULT_PRIORITY, LAST_PRIORITY = 1, 5, 9
"""As with Triton's request priorities, 1 is the highest."""
CANARY_PRIORITY = 0
"""The canary's priority, which no request can have: it is due first, and no other job waits for it to start."""
PRIORITY_PATIENCE = 4
"""Ticks that a job lets others go first, for each level that its priority is lower than theirs."""
START_PATIENCE = 16
"""Ticks that a job which has not started lets others go first: a large part of a job of usual length."""

_FOREVER = 10**9
"""More ticks than a server computes."""

CALL_OVERHEAD = 1
"""Fixed cost of a call, in rows: by UNet calls on an H200, 1.6 for SD 1.5 at 512 x 512 and 0.2 for SDXL at 1024."""
SWITCH_COST = 2
"""Cost of a switch to other LoRAs, in rows. Measured on a CPU: 0.2 for two LoRAs of all layers of SD 1.5. Not measured
on a GPU, where rows are fast and a switch launches several kernels per layer."""
TURN_COST = 8 * SWITCH_COST
"""Cost of the calls between two switches, in rows, so that switches take at most a ninth of the time."""


class Candidate(NamedTuple):
    """A job as the policy sees it."""

    batch_key: Hashable
    rows: int
    """Rows of the current step."""
    pending: int
    """Rows of the current step that are still to be computed."""
    last_served_tick: int
    """Until the job is first served, the tick in which it arrived."""
    started: bool
    priority: int = DEFAULT_PRIORITY
    frames: int = 1
    """Frames per row. A row takes as much room in a call as this many rows of one frame."""
    loras: Hashable = ()
    """Equal for jobs that run with the same weights, and so for jobs with the same batch key."""


class Turn(NamedTuple):
    """The LoRAs of the last call (`Candidate.loras`), and the cost of the calls since the switch to them, in rows."""

    loras: Hashable
    cost: int

    def after(self, leader: Candidate, rows: int, call_rows: CallRows) -> Turn:
        """Return the turn after a call of `rows` rows with the batch key of `leader`."""
        cost = leader.frames * call_rows.of_frames(leader.frames).padded(rows) + CALL_OVERHEAD
        return Turn(leader.loras, cost + (self.cost if leader.loras == self.loras else 0))


FIRST_TURN = Turn((), TURN_COST)
"""The turn before the first call; it is over."""


class RowGrant(NamedTuple):
    """Rows of the next call for the candidate at `index`."""

    index: int  # type: ignore[assignment]  # hides tuple.index
    rows: int


def patience(candidate: Candidate) -> int:
    """Return how many ticks after `last_served_tick` the candidate is due."""
    if candidate.priority == CANARY_PRIORITY:
        return -_FOREVER
    ticks = PRIORITY_PATIENCE * (candidate.priority - FIRST_PRIORITY)
    return ticks if candidate.started else ticks + START_PATIENCE


def plan(candidates: Sequence[Candidate], call_rows: CallRows, turn: Turn = FIRST_TURN) -> list[RowGrant]:
    """Choose the rows of the next call: all with one batch key, and at most `call_rows.most` frames or a single row.

    Jobs that are due at the same tick are ordered by size, small ones first, and then as in `candidates`.
    """
    if not candidates:
        return []
    order, waiting = _order(candidates), not_yet_startable(candidates, call_rows)
    leader = _leader([index for index in order if index not in waiting], candidates, turn)
    sharing = [index for index in order if candidates[index].batch_key == candidates[leader].batch_key]
    call_rows = call_rows.of_frames(candidates[leader].frames)
    limit = call_rows.most
    small = [i for i in sharing if i not in (leader, *waiting) and candidates[i].pending <= limit // 2]
    sharing.sort(key=lambda index: index in waiting)
    rows = {leader: min(candidates[leader].pending, limit - limit // 2 if small else limit)}
    room = limit - rows[leader]
    for index in (*small, *sharing):
        if not room:
            break
        given = rows.get(index, 0)
        more = min(candidates[index].pending - given, room)
        if more:
            rows[index] = given + more
            room -= more
    return list(_first(rows, rows_to_call(limit - room, call_rows)))


def _leader(order: Sequence[int], candidates: Sequence[Candidate], turn: Turn) -> int:
    """Return the first of `order`; until the turn is over, the first with its LoRAs, if any."""
    if turn.cost >= TURN_COST:
        return order[0]
    return next((index for index in order if candidates[index].loras == turn.loras), order[0])


def rows_to_call(pending: int, call_rows: CallRows) -> int:
    """Return how many of `pending` rows the next call computes. All of them can share a call.

    Without buckets, it computes as many as fit. With buckets, it fills one exactly, if the remaining rows then finish
    no later than with padding: 9 rows are computed as 8 and 1, not padded to 16, but 7 rows are padded to 8.
    """
    rows = min(pending, call_rows.most)
    return rows if _cost(rows, call_rows) == _cost_together(rows, call_rows) else call_rows.unpadded(rows)


def _cost(rows: int, call_rows: CallRows) -> int:
    """Return the cost of the cheapest calls for `rows` rows: one padded call, or a full bucket and then the rest."""
    together, full = _cost_together(rows, call_rows), call_rows.unpadded(rows)
    return together if full == rows else min(together, full + CALL_OVERHEAD + _cost(rows - full, call_rows))


def _cost_together(rows: int, call_rows: CallRows) -> int:
    return call_rows.padded(rows) + CALL_OVERHEAD


def _first(rows: Mapping[int, int], count: int) -> Iterator[RowGrant]:
    """Grant the first `count` of `rows`, which maps indices of candidates to numbers of rows."""
    for index, given in rows.items():
        if count:
            granted = min(given, count)
            yield RowGrant(index, granted)
            count -= granted


def not_yet_startable(candidates: Sequence[Candidate], call_rows: CallRows) -> set[int]:
    """Return the jobs that cannot start yet: other jobs with their key, running or starting earlier, fill a call.

    A job only waits for jobs of the same or a higher priority; a small job only for small ones, a large one for large.
    """
    rows = Counter[Hashable]()
    waiting = set()
    # Running jobs first: they already hold their rows when another job starts.
    for index in sorted(_order(candidates), key=lambda i: not candidates[i].started):
        candidate, room = candidates[index], call_rows.of_frames(candidates[index].frames).most
        crowd = (candidate.batch_key, candidate.rows > room // 2)
        before = sum(rows[crowd, priority] for priority in range(FIRST_PRIORITY, candidate.priority + 1))
        if not candidate.started and before >= room:
            waiting.add(index)
        else:
            rows[crowd, candidate.priority] += candidate.rows
    return waiting


def _order(candidates: Sequence[Candidate]) -> list[int]:
    return sorted(range(len(candidates)), key=lambda i: (_due(candidates[i]), candidates[i].pending, i))


def _due(candidate: Candidate) -> int:
    return candidate.last_served_tick + patience(candidate)
