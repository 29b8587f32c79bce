"""How an Envoy chooses a member, as Envoy's source does it. Each Envoy only counts its own requests."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np


class View:
    """What one Envoy knows: which members are up, and its own requests and rows at each of them."""

    def __init__(self, members: int, seed: int) -> None:
        self.up = np.ones(members, bool)
        self.requests = np.zeros(members, np.int64)
        self.rows = np.zeros(members, np.int64)
        self.chance = random.Random(seed)
        self._next = self.chance.randrange(members)

    def candidates(self) -> list[int]:
        return list(np.flatnonzero(self.up))

    def following(self) -> int:
        """Return the next member in turn that is up."""
        for _ in range(len(self.up)):
            self._next = (self._next + 1) % len(self.up)
            if self.up[self._next]:
                break
        return self._next

    def draw(self, count: int) -> int:
        """Return the member with the fewest requests among `count` draws, which may repeat."""
        drawn = [self.chance.randrange(len(self.up)) for _ in range(4 * count)]
        drawn = [member for member in drawn if self.up[member]][:count] or self.candidates()
        return min(drawn, key=self.requests.__getitem__)

    def least(self, values: np.ndarray) -> int:
        """Return one of the members with the smallest value."""
        values = np.where(self.up, values, np.iinfo(np.int64).max)
        return int(self.chance.choice(np.flatnonzero(values == values.min())))


Policy = Callable[[View], int]

POLICIES: dict[str, Policy] = {
    "round robin": View.following,
    "least requests, 2 draws": lambda view: view.draw(2),
    "least requests, 8 draws": lambda view: view.draw(8),
    "least requests of all": lambda view: view.least(view.requests),
    "least outstanding rows": lambda view: view.least(view.rows),
}
