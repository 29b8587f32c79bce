"""Encoded captions of all training pictures: computed once with the trained text tower, then looked up."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..world import Layout, Look
from .clip import Towers
from .words import empty_caption, full_caption, short_caption


@dataclass(frozen=True, kw_only=True, slots=True)
class Captions:
    """`states` [M, 32, 128] of the M distinct captions; `short` [N], `full` [N] and `empty` [E] are indices into it."""

    states: Tensor
    short: Tensor
    full: Tensor
    empty: Tensor

    def draw(
        self, rows: Tensor, weights: tuple[float, float, float], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw a short, full or empty caption per row: its states [B, 32, 128], and which of the three it is, [B]."""
        kind = torch.multinomial(torch.tensor(weights), len(rows), replacement=True, generator=generator)
        empty = self.empty[torch.randint(len(self.empty), (len(rows),), generator=generator)]
        chosen = torch.stack([self.short[rows], self.full[rows], empty]).gather(0, kind[None])[0]
        return self.states[chosen].float(), kind

    def blank(self, count: int) -> Tensor:
        """Repeat the states of the empty prompt, [count, 32, 128]."""
        return self.states[self.empty[:1]].float().expand(count, -1, -1)


@torch.no_grad()
def captions(towers: Towers, looks: Sequence[Look], layouts: Sequence[Layout]) -> dict[str, Tensor]:
    """Compute the fields of `Captions`: one short and one full caption per picture, and the empty ones."""
    rng = random.Random(5)
    numbers: dict[str, int] = {}

    def number(caption: str) -> int:
        return numbers.setdefault(caption, len(numbers))

    short = torch.tensor([number(short_caption(layout, rng)) for layout in layouts])
    pairs = zip(looks, layouts, strict=True)
    full = torch.tensor([number(full_caption(look, layout, rng)) for look, layout in pairs])
    empty = torch.tensor([number("")] * 12 + [number(empty_caption(rng)) for _ in range(20)])
    texts = list(numbers)
    parts = [towers.text(towers.tokens(texts[i : i + 500])).last_hidden_state.half() for i in range(0, len(texts), 500)]
    return {"states": torch.cat(parts), "short": short, "full": full, "empty": empty}
