"""Windows of frames, in which clips run that are longer than the motion modules see at once.

After the uniform context scheduler of AnimateDiff-Evolved (https://github.com/Kosinkadink/ComfyUI-AnimateDiff-Evolved):
windows move from step to step, so that their seams do, too; what several windows say of a frame is averaged, the middle
of a window counting most.
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
"""The frames of a window, in equal distances: slicing them out of a clip needs no index on the device."""


def windows(step: int, frames: int, context: ContextWindow) -> list[Window]:
    """The windows of denoising step ``step``: ``context.length`` frames each, together all frames of a clip.

    A clip within ``context.length`` is one window. ``context.stride`` is the number of window sizes: the second takes
    every second frame over twice the length, the third every fourth; each as far as the clip is long enough.
    """
    length = context.length
    if frames <= length:
        return [range(frames)]
    sizes = min(context.stride, math.ceil(math.log2(frames / length)) + 1)
    shift = _halving(step)
    found: dict[Window, None] = {}
    for every in (1 << size for size in range(sizes)):
        reach = (length - 1) * every
        if reach >= frames:
            continue
        # Windows move on by what they do not share; those that hang over an end are pulled back to it.
        hop = length * every - context.overlap
        offset = round(shift * hop)
        firsts = [min(max(first, 0), frames - 1 - reach) for first in range(offset - hop, frames, hop)]
        found |= dict.fromkeys(range(first, first + reach + 1, every) for first in firsts)
    return list(found)


def frames_of(clip: Tensor, window: Window, axis: int) -> Tensor:
    """A view of the frames of `window` in `clip`, whose frames lie along `axis`."""
    return clip[(slice(None),) * axis + (slice(window.start, window.stop, window.step),)]


def merge(noise_pred: Tensor, views: Sequence[Window], frames: int) -> Tensor:
    """The outputs of all windows [W * N, C, L, h, w], those of a window together, as one a clip [N, C, F, h, w]."""
    parts = noise_pred.chunk(len(views))
    total = noise_pred.new_zeros(*parts[0].shape[:2], frames, *parts[0].shape[3:])
    weights = noise_pred.new_zeros(frames)
    weight = _pyramid_on(noise_pred.device, len(views[0]))
    for part, view in zip(parts, views, strict=True):
        frames_of(total, view, 2).add_(part * weight[:, None, None])
        frames_of(weights, view, 0).add_(weight)
    return total / weights[:, None, None]


def pyramid(length: int) -> Tensor:
    """Weights of a window's frames [length]: 1 at both ends, most in the middle."""
    places = torch.arange(1, length + 1)
    return torch.minimum(places, places.flip(0)).float()


@lru_cache(maxsize=16)
def _pyramid_on(device: torch.device, length: int) -> Tensor:
    return upload(pyramid(length), device)


def _halving(step: int) -> float:
    """0, 1/2, 1/4, 3/4, 1/8, ...: the bits of ``step`` behind the point, in reverse."""
    value, bit = 0.0, 0.5
    while step:
        value, bit, step = value + bit * (step & 1), bit / 2, step >> 1
    return value
