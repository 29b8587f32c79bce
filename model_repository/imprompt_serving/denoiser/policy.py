"""Which rows the next call computes: a pure function of what is waiting."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple


class Candidate(NamedTuple):
    """A job as the policy sees it. ``served`` is the tick that last served it, -1 for a new one."""

    key: Hashable
    pending: int
    served: int
    arrived: float


class Share(NamedTuple):
    """Rows of the next call for the candidate at ``index``."""

    index: int  # type: ignore[assignment]  # hides tuple.index
    rows: int


def plan(candidates: Sequence[Candidate], limit: int) -> list[Share]:
    """Rows for the next call, at most ``limit`` in all, all of one key.

    The job that has waited longest leads and names the key; the others of that key follow in the same order, as long
    as there is room. A job served now goes to the back, so with K keys and N jobs nobody waits more than N ticks, and
    a job of many rows gets at most one call's worth before the others have their turn.
    """
    order = sorted(range(len(candidates)), key=lambda i: (candidates[i].served, candidates[i].arrived, i))
    shares: list[Share] = []
    for index in order:
        candidate = candidates[index]
        if candidate.key != candidates[order[0]].key or not limit:
            continue
        rows = min(candidate.pending, limit)
        shares.append(Share(index, rows))
        limit -= rows
    return shares
