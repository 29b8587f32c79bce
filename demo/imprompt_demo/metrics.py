"""Metrics of pictures: palette, texture, edges, and which thing is shown.

Pictures are uint8 arrays [H, W, 3]. All distances are 0 for identical pictures.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn

from . import bundle_path
from .world import THINGS

Pixels = NDArray[np.uint8]
_LEVELS = 6


def palette(pixels: Pixels) -> NDArray[np.float64]:
    """Compute the color histogram [6, 6, 6] over RGB, blurred by one bin so that similar colors overlap."""
    bins = pixels.reshape(-1, 3).astype(np.float64) * (_LEVELS - 1) / 255
    low = np.minimum(np.floor(bins).astype(int), _LEVELS - 2)
    part = bins - low
    histogram = np.zeros((_LEVELS,) * 3)
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod(np.where(np.array(corner), part, 1 - part), axis=1)
        np.add.at(histogram, tuple((low + corner).T), weight)
    return histogram / len(bins)


def palette_distance(a: Pixels, b: Pixels) -> float:
    """Compute half the absolute difference of the color histograms: 0 if equal, 1 if no color is shared."""
    return float(np.abs(palette(a) - palette(b)).sum() / 2)


def texture(pixels: Pixels) -> NDArray[np.float64]:
    """Compute the amplitude of the brightness spectrum, [3 scales, 4 directions]."""
    gray = pixels.astype(np.float64).mean(-1)
    gray = (gray - gray.mean()) * np.outer(np.hanning(gray.shape[0]), np.hanning(gray.shape[1]))
    power = np.abs(np.fft.fftshift(np.fft.fft2(gray))) ** 2
    y, x = np.mgrid[0 : gray.shape[0], 0 : gray.shape[1]]
    y, x = y - gray.shape[0] // 2, x - gray.shape[1] // 2
    radius, angle = np.hypot(x, y), np.mod(np.arctan2(y, x), np.pi)
    sector = np.mod(np.round(angle / (np.pi / 4)).astype(int), 4)
    rings = ((1.5, 3), (3, 6), (6, 14))
    cells = [[power[(radius >= a) & (radius < b) & (sector == s)].sum() for s in range(4)] for a, b in rings]
    return np.sqrt(np.array(cells)) / gray.size


def texture_distance(a: Pixels, b: Pixels) -> float:
    """Compute the distance of two textures relative to their strength, 0 to 1."""
    one, two = texture(a), texture(b)
    return float(np.linalg.norm(one - two) / (np.linalg.norm(one) + np.linalg.norm(two) + 1e-9))


def sharpness(pixels: Pixels) -> NDArray[np.float64]:
    """Compute the magnitude of the brightness and color gradient, [H, W]."""
    planes = np.pad(pixels.astype(np.float64), ((1, 1), (1, 1), (0, 0)), mode="edge")
    dx, dy = planes[1:-1, 2:] - planes[1:-1, :-2], planes[2:, 1:-1] - planes[:-2, 1:-1]
    return np.sqrt((dx**2 + dy**2).sum(-1)) / 2


def edge_agreement(pixels: Pixels, edges: Pixels) -> float:
    """Compute the ratio of gradients on the given lines [H, W] to gradients elsewhere; 1 means unrelated."""
    gradient, lines = sharpness(pixels), edges > 127
    return float(gradient[lines].mean() / (gradient[~lines].mean() + 1e-9))


def outside_change(a: Pixels, b: Pixels, mask: NDArray[np.bool_]) -> float:
    """Compute the mean absolute difference, in levels of 255, of the pixels outside a mask [H, W]."""
    return float(np.abs(a.astype(int) - b.astype(int))[~mask].mean())


def smoothness(frames: Pixels) -> float:
    """Compute the mean change between consecutive frames [F, H, W, 3] over that between any two; 1 means noise."""
    stack = frames.astype(np.float64)
    steps = np.abs(np.diff(stack, axis=0)).mean()
    pairs = [np.abs(stack[i] - stack[j]).mean() for i in range(len(stack)) for j in range(i)]
    return float(steps / (np.mean(pairs) + 1e-9))


def thing_network() -> nn.Sequential:
    """Build the untrained classifier: pictures [B, 3, 64, 64] in -1..1 to scores [B, 12]; 0.1 million weights."""
    layers: list[nn.Module] = []
    for before, after in pairwise((3, 24, 48, 64, 64)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, len(THINGS)))


class ThingClassifier:
    """Classifies which thing a picture shows, with a network from the bundle that was trained on the world."""

    def __init__(self, bundle: Path | None = None) -> None:
        weights = load_file((bundle or bundle_path()) / "checkpoints" / "things.safetensors")
        self._network = thing_network().eval()
        self._network.load_state_dict({name: value.float() for name, value in weights.items()})

    @torch.no_grad()
    def __call__(self, pictures: list[Pixels]) -> list[str]:
        """Return the most likely thing in each picture."""
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
        names = list(THINGS)
        return [names[i] for i in self._network(pixels).argmax(1).tolist()]
