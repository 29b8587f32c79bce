"""Rows of several jobs as the inputs of one UNet call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from imprompt_serving import tensor_names
from imprompt_serving.denoiser.image_prompts import pad
from imprompt_serving.denoiser.protocol import LoopJob
from imprompt_serving.specs import Bundle, CallRows


class RowSlice(NamedTuple):
    """Rows ``start`` to ``stop`` of a job."""

    job: LoopJob
    start: int
    stop: int


class Batcher:
    """Stacks rows, padded to what a call runs; conditioning once for each composition of a batch, not at each step."""

    def __init__(self, bundle: Bundle, call_rows: CallRows | None = None) -> None:
        self._bucket, self._call_rows = bundle.shapes.bucket, call_rows or bundle.shapes.call_rows()
        self._adapters = {
            name: adapter.name
            for adapter in bundle.adapters
            for name in tensor_names.ip_inputs(adapter.name, bundle.levels)
        }
        self._composition: list[tuple[RowSlice, int]] = []
        self._conditioning: dict[str, Tensor] = {}

    def inputs(self, parts: list[RowSlice]) -> dict[str, Tensor]:
        """UNet inputs of ``parts``, one after the other; the last row is repeated where a call has to have more."""
        sources = [part.job.conditioning() for part in parts]
        composition = [(part, id(source)) for part, source in zip(parts, sources, strict=True)]
        if composition != self._composition:
            self._conditioning = self._stack(parts, sources)
            self._composition = composition
        count = self._count(parts)
        latents, timesteps = zip(*(part.job.model_input() for part in parts), strict=True)
        rows = [slice(part.start, part.stop) for part in parts]
        return {
            "sample": stack([tensor[r] for tensor, r in zip(latents, rows, strict=True)], count),
            "timestep": stack([tensor[r] for tensor, r in zip(timesteps, rows, strict=True)], count),
            **self._conditioning,
        }

    def forget(self) -> None:
        """Let go of the last composition's tensors."""
        self._composition, self._conditioning = [], {}

    def _stack(self, parts: list[RowSlice], sources: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        sizes = {adapter: self._widest(adapter, sources) for adapter in set(self._adapters.values())}
        count = self._count(parts)
        blocks = [
            (source, block.conditioning)
            for part, source in zip(parts, sources, strict=True)
            for block in part.job.blocks(part.start, part.stop)
        ]
        stacked = {}
        for name in sources[0]:
            rows = [source[name][rows.start : rows.stop] for source, rows in blocks]
            if name in self._adapters:
                rows = [pad(tensor, name, *sizes[self._adapters[name]]) for tensor in rows]
            stacked[name] = stack(rows, count)
        return stacked

    def _count(self, parts: list[RowSlice]) -> int:
        """Rows of a call that computes ``parts``."""
        call_rows = self._call_rows.of_frames(parts[0].job.frames)
        return call_rows.padded(sum(part.stop - part.start for part in parts))

    def _widest(self, adapter: str, sources: list[Mapping[str, Tensor]]) -> tuple[int, int]:
        """Groups, and tokens up to the next padding bucket."""
        shapes = [source[tensor_names.ip_tokens(adapter)].shape for source in sources]
        tokens = max(shape[2] for shape in shapes)
        return max(shape[1] for shape in shapes), self._bucket(tokens) if tokens > 1 else 1


def stack(tensors: Sequence[Tensor], count: int) -> Tensor:
    """The rows of ``tensors`` one after the other, and the last one again until there are ``count``."""
    missing, last = count - sum(map(len, tensors)), tensors[-1][-1:]
    if missing:
        tensors = [*tensors, last.expand(missing, *last.shape[1:])]
    return tensors[0] if len(tensors) == 1 else torch.cat([*tensors])
