"""Apply LoRAs to the weights of a loaded network in place (https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from imprompt_serving.backends.inductor import LORA_DOWN, LORA_UP, lora_files


class _Factors(NamedTuple):
    """The change of one weight at scale 1, `up @ down`, as matrices."""

    down: Tensor
    up: Tensor


class _Layer(NamedTuple):
    """A weight that the network reads, and the original one, as matrices."""

    weight: Tensor
    base: Tensor


class LoraWeights:
    """The weights of a network, with the LoRAs that change them.

    Weights are always computed from the original ones, never from those of the previous LoRAs, so the same LoRAs give
    the same bits whatever was used before.

    Args:
        file: the engine, with its LoRAs next to it.
        weights: the weights that the engine reads, by name. They are changed in place.
        base: returns a copy of an original weight, in the same memory format.
    """

    def __init__(self, file: Path, weights: Mapping[str, Tensor], base: Callable[[str], Tensor]) -> None:
        self._loras = {name: _factors(load_file(path), weights) for name, path in lora_files(file).items()}
        names = {name for layers in self._loras.values() for name in layers}
        self._layers = {name: _Layer(_matrix(weights[name]), _matrix(base(name))) for name in names}
        self._scales: dict[str, float] | None = {}
        """The LoRAs in use; None after a switch that failed."""
        self._changed = set[str]()
        """Weights that may differ from the original ones."""

    @torch.no_grad()
    def use(self, scales: Mapping[str, float]) -> None:
        """Set the weights to the original ones with LoRAs of these scales, and no others."""
        if scales == self._scales:
            return
        self._scales = None
        used = {name for lora in scales for name in self._loras[lora]}
        self._changed |= used
        for name in self._changed:
            weight, base = self._layers[name]
            parts = [(self._loras[lora][name], scale) for lora, scale in scales.items() if name in self._loras[lora]]
            if parts:
                up = torch.cat([factors.up * scale for factors, scale in parts], dim=1)
                down = torch.cat([factors.down for factors, _ in parts])
                torch.addmm(base, up, down, out=weight)
            else:
                weight.copy_(base)
        self._changed = used
        self._scales = dict(scales)


def _factors(tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, _Factors]:
    """Return the factors for each weight that a LoRA changes, in the memory format of the weight."""
    names = [name.removesuffix(LORA_DOWN) for name in tensors if name.endswith(LORA_DOWN)]
    return {name: _fitted(tensors[name + LORA_DOWN], tensors[name + LORA_UP], weights[name]) for name in names}


def _fitted(down: Tensor, up: Tensor, weight: Tensor) -> _Factors:
    down = down.reshape(-1, *weight.shape[1:]).to(weight)
    if _is_channels_last(weight):
        down = down.contiguous(memory_format=torch.channels_last)
    return _Factors(_matrix(down), up.to(weight))


def _matrix(weight: Tensor) -> Tensor:
    """View a weight as a matrix [outputs, rest], sharing its memory."""
    return (
        weight.permute(0, 2, 3, 1).view(len(weight), -1) if _is_channels_last(weight) else weight.view(len(weight), -1)
    )


def _is_channels_last(weight: Tensor) -> bool:
    return not weight.is_contiguous()
