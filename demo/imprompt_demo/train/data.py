"""The training pictures: looks, each painted on several layouts, rendered once and kept in a file."""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..world import Layout, Look, render, sample_layout, sample_look

LOOKS = 5000
LAYOUTS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Pictures:
    """N = looks x layouts pictures; neighbours in groups of `LAYOUTS` share a look.

    `pixels` [N, 64, 64, 3] uint8, `edges` [N, 64, 64] uint8; `looks` and `layouts` have N entries.
    """

    pixels: Tensor
    edges: Tensor
    looks: list[Look]
    layouts: list[Layout]

    def batch(self, rows: Tensor) -> Tensor:
        """Pictures as [B, 3, 64, 64] floats from -1 to 1."""
        return self.pixels[rows].permute(0, 3, 1, 2).float().div(127.5).sub(1)

    def edge_batch(self, rows: Tensor) -> Tensor:
        """Edge maps as [B, 3, 64, 64] floats from 0 to 1."""
        return self.edges[rows][:, None].float().div(255).repeat(1, 3, 1, 1)


def pictures(folder: Path, seed: int = 0) -> Pictures:
    """Render, or read what was rendered before."""
    rng = random.Random(seed)
    looks, layouts = [], []
    for _ in range(LOOKS):
        look = sample_look(rng)
        looks += [look] * LAYOUTS
        layouts += [sample_layout(rng) for _ in range(LAYOUTS)]
    file = folder / "pictures.npz"
    if not file.exists():
        rendered = [render(look, layout) for look, layout in zip(looks, layouts, strict=True)]
        pixels, edges = np.stack([p.pixels for p in rendered]), np.stack([p.edges for p in rendered])
        np.savez(file, pixels=pixels, edges=edges)
    stored = np.load(file)
    return Pictures(
        pixels=torch.from_numpy(stored["pixels"]),
        edges=torch.from_numpy(stored["edges"]),
        looks=looks,
        layouts=layouts,
    )
