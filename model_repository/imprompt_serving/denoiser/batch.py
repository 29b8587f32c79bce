"""Stack the rows of several jobs into the inputs of one UNet call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from imprompt_serving import tensor_names
from imprompt_serving.denoiser.image_prompts import differs_by_frame, in_window, pad_image_prompt
from imprompt_serving.denoiser.protocol import LoopJob
from imprompt_serving.specs import Bundle, CallRows

_TEXT = "encoder_hidden_states"


class RowSlice(NamedTuple):
    """Rows `start` to `stop` of a job."""

    job: LoopJob
    start: int
    stop: int


class Batcher:
    """Stacks rows and pads them to the number of rows that a call runs.

    Conditioning is stacked again only when the composition of the batch changes, not at every step.
    """

    def __init__(self, bundle: Bundle, call_rows: CallRows | None = None) -> None:
        self._bucket, self._call_rows = bundle.shapes.bucket, call_rows or bundle.shapes.call_rows()
        self._adapters = {
            name: adapter.name
            for adapter in bundle.adapters
            for name in tensor_names.ip_inputs(adapter.name, bundle.levels)
        }
        self._text_tokens = bundle.text_encoders[0].max_length
        self._composition: list[tuple[RowSlice, int, tuple[range | None, ...]]] = []
        self._conditioning: dict[str, Tensor] = {}

    def inputs(self, slices: list[RowSlice]) -> dict[str, Tensor]:
        """Return the UNet inputs of `slices`, in order. Repeat the last row where a call must have more rows."""
        sources = [part.job.conditioning() for part in slices]
        composition = [
            (part, id(source), self._windows(part, source)) for part, source in zip(slices, sources, strict=True)
        ]
        if composition != self._composition:
            self._conditioning = self._stack(slices, sources)
            self._composition = composition
        count = self._count(slices)
        latents, timesteps = zip(*(part.job.model_input() for part in slices), strict=True)
        rows = [slice(part.start, part.stop) for part in slices]
        return {
            "sample": stack([tensor[r] for tensor, r in zip(latents, rows, strict=True)], count),
            "timestep": stack([tensor[r] for tensor, r in zip(timesteps, rows, strict=True)], count),
            **self._conditioning,
        }

    def forget(self) -> None:
        """Free the tensors of the last composition."""
        self._composition, self._conditioning = [], {}

    def _stack(self, slices: list[RowSlice], sources: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        sizes = {adapter: self._widest(adapter, sources) for adapter in set(self._adapters.values())}
        count = self._count(slices)
        blocks = [
            (source, block)
            for part, source in zip(slices, sources, strict=True)
            for block in part.job.blocks(part.start, part.stop)
        ]
        frames = slices[0].job.frames
        stacked = {}
        for name in sources[0]:
            rows = [source[name][block.conditioning.start : block.conditioning.stop] for source, block in blocks]
            if name == _TEXT:
                rows = _repeat_tokens(rows, self._text_tokens)
            elif name in self._adapters:
                windows = [block.window or range(frames) for _, block in blocks]
                rows = [in_window(tensor, name, window) for tensor, window in zip(rows, windows, strict=True)]
                rows = [pad_image_prompt(tensor, name, *sizes[self._adapters[name]]) for tensor in rows]
            stacked[name] = stack(rows, count)
        return stacked

    def _windows(self, part: RowSlice, source: Mapping[str, Tensor]) -> tuple[range | None, ...]:
        """Return the windows of `part` if its image prompts differ by frame: they move from step to step."""
        if not any(differs_by_frame(source[name], name) for name in self._adapters):
            return ()
        return tuple(block.window for block in part.job.blocks(part.start, part.stop))

    def _count(self, slices: list[RowSlice]) -> int:
        """Return the number of rows, padding included, of a call that computes `slices`."""
        call_rows = self._call_rows.of_frames(slices[0].job.frames)
        return call_rows.padded(sum(part.stop - part.start for part in slices))

    def _widest(self, adapter: str, sources: list[Mapping[str, Tensor]]) -> tuple[int, int]:
        """Return the largest number of groups, and of tokens rounded up to the next bucket."""
        shapes = [source[tensor_names.ip_tokens(adapter)].shape for source in sources]
        tokens = max(shape[-2] for shape in shapes)
        return max(shape[-3] for shape in shapes), self._bucket(tokens) if tokens > 1 else 1


def _repeat_tokens(rows: Sequence[Tensor], least: int) -> list[Tensor]:
    """Bring text embeddings [rows, tokens, features] to the same length of at least `least`, a multiple of each.

    Repeating all tokens of a text does not change the output of attention: the softmax distributes the weight of each
    token over its copies. Nothing else in a network depends on the number of tokens.
    """
    longest = max(tensor.shape[1] for tensor in rows)
    while longest < least:
        longest *= 2
    return [tensor.repeat(1, longest // tensor.shape[1], 1) if tensor.shape[1] < longest else tensor for tensor in rows]


def stack(tensors: Sequence[Tensor], count: int) -> Tensor:
    """Concatenate the rows of `tensors`, and repeat the last row until there are `count`."""
    missing, last = count - sum(map(len, tensors)), tensors[-1][-1:]
    if missing:
        tensors = [*tensors, last.expand(missing, *last.shape[1:])]
    return tensors[0] if len(tensors) == 1 else torch.cat([*tensors])
