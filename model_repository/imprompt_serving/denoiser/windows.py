"""Overlapping windows of frames, for clips that are longer than the motion modules can process at once.

Follows the uniform context scheduler of AnimateDiff-Evolved
(https://github.com/Kosinkadink/ComfyUI-AnimateDiff-Evolved). Windows move from step to step, so that their seams move
too. Where windows overlap, their outputs are averaged, with more weight on the middle of a window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from imprompt_serving.gpu import upload
from imprompt_serving.job_request import ContextWindow

Window = range
"""The evenly spaced frames of a window. A range lets a clip be sliced without an index tensor on the device."""


def windows(step: int, frames: int, context: ContextWindow) -> list[Window]:
    """Return the windows of denoising step `step`: `context.length` frames each, together all frames of a clip.

    A clip of at most `context.length` frames is one window. `context.stride` is the number of window sizes: the second
    size takes every second frame and spans twice the length, the third takes every fourth, and so on. Sizes that span
    more than the clip are left out.
    """
    length = context.length
    if frames <= length:
        return [range(frames)]
    sizes = min(context.stride, math.ceil(math.log2(frames / length)) + 1)
    shift = _bit_reversed(step)
    found: dict[Window, None] = {}
    for every in (1 << size for size in range(sizes)):
        reach = (length - 1) * every
        if reach >= frames:
            continue
        # Each window starts where its overlap with the last one begins. Windows are moved back inside the clip.
        hop = length * every - context.overlap
        offset = round(shift * hop)
        firsts = [min(max(first, 0), frames - 1 - reach) for first in range(offset - hop, frames, hop)]
        found |= dict.fromkeys(range(first, first + reach + 1, every) for first in firsts)
    return list(found)


def select_frames(clip: Tensor, window: Window, *, axis: int) -> Tensor:
    """Return a view of the frames of `window` in `clip`, which has its frames along `axis`."""
    return clip[(slice(None),) * axis + (slice(window.start, window.stop, window.step),)]


def merge(noise_pred: Tensor, views: Sequence[Window], frames: int) -> Tensor:
    """Merge the outputs of all windows, one window after the other [W * N, C, L, h, w], into clips [N, C, F, h, w]."""
    parts = noise_pred.chunk(len(views))
    total = noise_pred.new_zeros(*parts[0].shape[:2], frames, *parts[0].shape[3:])
    weights = noise_pred.new_zeros(frames)
    weight = _pyramid_on(noise_pred.device, len(views[0]))
    for part, view in zip(parts, views, strict=True):
        select_frames(total, view, axis=2).add_(part * weight[:, None, None])
        select_frames(weights, view, axis=0).add_(weight)
    return total / weights[:, None, None]


def pyramid(length: int) -> Tensor:
    """Return the weights of a window's frames [length]: 1 at both ends, increasing to the middle."""
    positions = torch.arange(1, length + 1)
    return torch.minimum(positions, positions.flip(0)).float()


@lru_cache(maxsize=16)
def _pyramid_on(device: torch.device, length: int) -> Tensor:
    return upload(pyramid(length), device)


def _bit_reversed(step: int) -> float:
    """Return 0, 1/2, 1/4, 3/4, 1/8, ...: the bits of `step` in reverse, after the binary point."""
    value, bit = 0.0, 0.5
    while step:
        value, bit, step = value + bit * (step & 1), bit / 2, step >> 1
    return value
