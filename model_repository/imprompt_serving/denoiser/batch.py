"""Rows of several jobs as the inputs of one UNet call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from imprompt_serving import tensor_names
from imprompt_serving.denoiser.image_prompts import pad
from imprompt_serving.denoiser.protocol import LoopJob
from imprompt_serving.specs import Bundle


class RowSlice(NamedTuple):
    """Rows ``start`` to ``stop`` of a job."""

    job: LoopJob
    start: int
    stop: int


class Batcher:
    """Stacks rows; conditioning is stacked once for each composition of a batch, not at each step."""

    def __init__(self, bundle: Bundle) -> None:
        self._bucket = bundle.shapes.bucket
        self._adapters = {
            name: adapter.name
            for adapter in bundle.adapters
            for name in tensor_names.ip_inputs(adapter.name, bundle.levels)
        }
        self._composition: list[tuple[RowSlice, int]] = []
        self._conditioning: dict[str, Tensor] = {}

    def inputs(self, parts: list[RowSlice]) -> dict[str, Tensor]:
        """UNet inputs of ``parts``, one after the other."""
        sources = [part.job.conditioning() for part in parts]
        composition = [(part, id(source)) for part, source in zip(parts, sources, strict=True)]
        if composition != self._composition:
            self._conditioning = self._stack(parts, sources)
            self._composition = composition
        latents, timesteps = zip(*(part.job.model_input() for part in parts), strict=True)
        rows = [slice(part.start, part.stop) for part in parts]
        return {
            "sample": torch.cat([tensor[r] for tensor, r in zip(latents, rows, strict=True)]),
            "timestep": torch.cat([tensor[r] for tensor, r in zip(timesteps, rows, strict=True)]),
            **self._conditioning,
        }

    def forget(self) -> None:
        """Let go of the last composition's tensors."""
        self._composition, self._conditioning = [], {}

    def _stack(self, parts: list[RowSlice], sources: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        sizes = {adapter: self._widest(adapter, sources) for adapter in set(self._adapters.values())}
        indices = [part.job.conditioning_rows(part.start, part.stop) for part in parts]
        stacked = {}
        for name in sources[0]:
            rows = [_rows(source[name], index) for index, source in zip(indices, sources, strict=True)]
            if name in self._adapters:
                rows = [pad(tensor, name, *sizes[self._adapters[name]]) for tensor in rows]
            stacked[name] = torch.cat(rows)
        return stacked

    def _widest(self, adapter: str, sources: list[Mapping[str, Tensor]]) -> tuple[int, int]:
        """Groups, and tokens up to the next padding bucket."""
        shapes = [source[tensor_names.ip_tokens(adapter)].shape for source in sources]
        tokens = max(shape[2] for shape in shapes)
        return max(shape[1] for shape in shapes), self._bucket(tokens) if tokens > 1 else 1


def _rows(tensor: Tensor, index: Sequence[int]) -> Tensor:
    """Rows of ``tensor``; a range is a view of them, for which nothing has to be sent to a device."""
    return tensor[index.start : index.stop] if isinstance(index, range) else tensor[index]
