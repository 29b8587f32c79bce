"""Decides which rows the next call of the UNet computes: a pure function of the jobs.

Every job has a tick at which it is due. The job that is due first leads: its batch key names the call, and other jobs
of that key ride along while there are rows left. Serving a job moves it behind those that were not served.

- A job starts when the started jobs of its key leave room in a call (`not_yet_startable` tells which have to wait).
  Under load, pictures then finish one after the other instead of all late. Small jobs do not wait for large ones, nor
  jobs of high priority for others.
- No job starves: once a job is due, every job that is served instead moves behind it, so it waits at most
  `patience(...)` ticks plus one (with LoRAs: a turn) for each other job. A job that has not started lets other keys go
  first for a while.
- No row of a call stays empty while a job of its key has one to compute. Where calls are padded, rows that would
  spill into the next bucket may be left to the next call (`rows_to_call`).
- Jobs with other LoRAs than the last call wait until its LoRAs have had their turn (`Turn`), for a switch takes time.
- A large job leaves half of a call to small ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple

from imprompt_serving.specs import CallRows

FIRST_PRIORITY, DEFAULT_PRIORITY, LAST_PRIORITY = 1, 5, 9
"""As with Triton's own request priorities, 1 goes first."""
PRIORITY_PATIENCE = 4
"""Ticks that a job lets others go first, for each level of priority that it is behind them."""
START_PATIENCE = 16
"""Ticks that a job which has not begun lets others go first: a good part of a job of usual size."""

CALL_OVERHEAD = 1
"""What a call takes beside its rows, in rows: on an H200 1.6 for SD 1.5 at 512 x 512, 0.2 for SDXL at 1024 x 1024."""
SWITCH_COST = 2
"""What a switch to other LoRAs takes, in rows: on a CPU 0.2, for two LoRAs of all layers of SD 1.5. It was not
measured on a GPU, where rows are short and a switch starts several kernels for each layer."""
TURN_COST = 8 * SWITCH_COST
"""Rows that the calls after a switch take before the next switch: switches then take at most a ninth of the time."""


class Candidate(NamedTuple):
    """A job as the policy sees it: the rows of its step, and how many of them are still to be computed.

    `last_served_tick` is the tick in which it came until it is served. A row of `frames` frames takes as much room as
    that many rows of one frame.
    """

    batch_key: Hashable
    rows: int
    pending: int
    last_served_tick: int
    begun: bool
    priority: int = DEFAULT_PRIORITY
    frames: int = 1
    loras: Hashable = ()
    """Equal for jobs that run on the same weights; jobs of one batch key do."""


class Turn(NamedTuple):
    """The LoRAs of the last call (`Candidate.loras`), and what the calls with them have cost, in rows."""

    loras: Hashable
    cost: int

    def after(self, leader: Candidate, rows: int, call_rows: CallRows) -> Turn:
        """The turn after a call of `rows` rows of the batch key of `leader`."""
        cost = leader.frames * call_rows.of_frames(leader.frames).padded(rows) + CALL_OVERHEAD
        return Turn(leader.loras, cost + (self.cost if leader.loras == self.loras else 0))


FIRST_TURN = Turn((), TURN_COST)
"""Before the first call."""


class RowGrant(NamedTuple):
    """Rows of the next call for the candidate at `index`."""

    index: int  # type: ignore[assignment]  # hides tuple.index
    rows: int


def patience(candidate: Candidate) -> int:
    """Ticks after `last_served_tick` at which `candidate` is due."""
    waits = PRIORITY_PATIENCE * (candidate.priority - FIRST_PRIORITY)
    return waits if candidate.begun else waits + START_PATIENCE


def plan(candidates: Sequence[Candidate], call_rows: CallRows, turn: Turn = FIRST_TURN) -> list[RowGrant]:
    """Rows for the next call: all of one batch key, and at most `call_rows.most` frames in all or a single row.

    Jobs that are due at the same tick are ordered by size, small ones first, then as in `candidates`.
    """
    if not candidates:
        return []
    order, waiting = _order(candidates), not_yet_startable(candidates, call_rows)
    leader = _leader([index for index in order if index not in waiting], candidates, turn)
    riders = [index for index in order if candidates[index].batch_key == candidates[leader].batch_key]
    call_rows = call_rows.of_frames(candidates[leader].frames)
    limit = call_rows.most
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
    return list(_first(rows, rows_to_call(limit - room, call_rows)))


def _leader(order: Sequence[int], candidates: Sequence[Candidate], turn: Turn) -> int:
    """The first of `order`, or the first with the LoRAs of the turn while it lasts."""
    if turn.cost >= TURN_COST:
        return order[0]
    return next((index for index in order if candidates[index].loras == turn.loras), order[0])


def rows_to_call(pending: int, call_rows: CallRows) -> int:
    """How many of `pending` rows that can share a call the next one computes: as many as it holds, if not padded.

    With buckets, as many as fill one, if the rest is then computed no later than with padding: 9 rows are a call of 8
    and one of 1, not one of 16; 7 rows are one of 8.
    """
    rows = min(pending, call_rows.most)
    return rows if _cost(rows, call_rows) == _cost_together(rows, call_rows) else call_rows.unpadded(rows)


def _cost(rows: int, call_rows: CallRows) -> int:
    """Cost of the cheapest calls for `rows` rows: one with padding, or a full bucket and calls for the rest."""
    together, full = _cost_together(rows, call_rows), call_rows.unpadded(rows)
    return together if full == rows else min(together, full + CALL_OVERHEAD + _cost(rows - full, call_rows))


def _cost_together(rows: int, call_rows: CallRows) -> int:
    return call_rows.padded(rows) + CALL_OVERHEAD


def _first(rows: Mapping[int, int], count: int) -> Iterator[RowGrant]:
    """The first `count` of `rows` (by index of a candidate)."""
    for index, given in rows.items():
        if count:
            granted = min(given, count)
            yield RowGrant(index, granted)
            count -= granted


def not_yet_startable(candidates: Sequence[Candidate], call_rows: CallRows) -> set[int]:
    """Jobs that cannot start yet, because jobs of their key that have started, or start before them, fill a call.

    Only jobs of at least their priority count, and only small ones for small jobs and large ones for large jobs.
    """
    rows = Counter[Hashable]()
    waiting = set()
    # Started jobs first: what they take is taken before another one starts.
    for index in sorted(_order(candidates), key=lambda i: not candidates[i].begun):
        candidate, room = candidates[index], call_rows.of_frames(candidates[index].frames).most
        crowd = (candidate.batch_key, candidate.rows > room // 2)
        before = sum(rows[crowd, priority] for priority in range(FIRST_PRIORITY, candidate.priority + 1))
        if not candidate.begun and before >= room:
            waiting.add(index)
        else:
            rows[crowd, candidate.priority] += candidate.rows
    return waiting


def _order(candidates: Sequence[Candidate]) -> list[int]:
    return sorted(range(len(candidates)), key=lambda i: (_due(candidates[i]), candidates[i].pending, i))


def _due(candidate: Candidate) -> int:
    return candidate.last_served_tick + patience(candidate)
