"""The training pictures: random looks, each applied to several layouts; rendered once and stored in a file."""

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..world import Layout, Look, Paint, render, sample_layout, sample_look

LOOKS = 1500
LAYOUTS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Pictures:
    """N = looks x layouts pictures; each group of `LAYOUTS` consecutive ones shares a look.

    `pixels` [N, 64, 64, 3] uint8, `edges` [N, 64, 64] uint8; `looks` and `layouts` have N entries.
    """

    pixels: Tensor
    edges: Tensor
    looks: list[Look]
    layouts: list[Layout]

    def batch(self, rows: Tensor) -> Tensor:
        """Return pictures as [B, 3, 64, 64] floats in -1..1."""
        return self.pixels[rows].permute(0, 3, 1, 2).float().div(127.5).sub(1)

    def edge_batch(self, rows: Tensor) -> Tensor:
        """Return edge maps as [B, 3, 64, 64] floats in 0..1."""
        return self.edges[rows][:, None].float().div(255).repeat(1, 3, 1, 1)


def pictures(folder: Path, seed: int = 0) -> Pictures:
    """Load the training pictures, rendering them first if necessary."""
    file = folder / "pictures.npz"
    if not file.exists():
        _render_all(file, random.Random(seed))
    stored = np.load(file)
    scenes = json.loads(str(stored["scenes"]))
    return Pictures(
        pixels=torch.from_numpy(stored["pixels"]),
        edges=torch.from_numpy(stored["edges"]),
        looks=[Look(body=Paint(**look["body"]), ground=Paint(**look["ground"])) for look, _ in scenes],
        layouts=[Layout(**layout | {"shift": tuple(layout["shift"])}) for _, layout in scenes],
    )


def _render_all(file: Path, rng: random.Random) -> None:
    rendered = []
    for _ in range(LOOKS):
        look = sample_look(rng)
        rendered += [render(look, sample_layout(rng)) for _ in range(LAYOUTS)]
    pixels, edges = np.stack([p.pixels for p in rendered]), np.stack([p.edges for p in rendered])
    scenes = json.dumps([[asdict(p.look), asdict(p.layout)] for p in rendered])
    np.savez(file, pixels=pixels, edges=edges, scenes=np.array(scenes))
