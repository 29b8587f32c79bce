"""The networks of one denoising step: ControlNets, then the UNet, all in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from imprompt_serving.denoiser.batch import Part
from imprompt_serving.denoiser.control import Control
from imprompt_serving.engines import Engine
from imprompt_serving.specs import Bundle, level_size

Arrays = dict[str, np.ndarray]
_TEXT = ("encoder_hidden_states", "text_embeds", "time_ids")


class _Use(NamedTuple):
    """Rows of a batch that one control acts on, and the pictures of its job that these rows belong to."""

    control: Control
    rows: list[int]
    pictures: list[int]


class Networks:
    """The UNet of a bundle and its ControlNets, by name.

    Rows without control share the call of rows with it, with residuals of zero: adding them costs next to nothing,
    while a call of its own would cost a whole pass over the weights.
    """

    def __init__(self, bundle: Bundle, unet: Engine, controlnets: Mapping[str, Engine]) -> None:
        self._bundle, self._unet, self._controlnets = bundle, unet, controlnets
        self._zeros: Arrays = {}
        self._zeros_of: tuple[int, ...] = ()

    def __call__(self, parts: Sequence[Part], inputs: Mapping[str, Tensor]) -> Tensor:
        """The noise that the UNet predicts for ``inputs``, the rows of ``parts`` one after the other."""
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        if self._bundle.controlnets:
            arrays |= self._residuals(parts, arrays)
        return torch.from_numpy(self._unet.run(arrays)["noise_pred"])

    def _residuals(self, parts: Sequence[Part], arrays: Arrays) -> Arrays:
        """What the ControlNets of all rows add; each net runs once, over the rows that use it."""
        uses = _uses(parts)
        rows, _, height, width = arrays["sample"].shape
        if not uses:
            if self._zeros_of != (rows, height, width):
                self._zeros, self._zeros_of = self._empty(rows, height, width), (rows, height, width)
            return self._zeros
        total = self._empty(rows, height, width)
        for name in dict.fromkeys(use.control.name for use in uses):
            acting = [use for use in uses if use.control.name == name]
            places = [row for use in acting for row in use.rows]
            answer = self._controlnets[name].run(self._control_inputs(acting, places, arrays))
            for residual, value in answer.items():
                total[residual][places] += value
        return total

    def _control_inputs(self, uses: list[_Use], places: list[int], arrays: Arrays) -> Arrays:
        """Inputs of one ControlNet: its rows of the batch, without the mask that inpainting UNets take."""
        embedding = torch.cat([use.control.embedding[use.pictures] for use in uses])
        scale = torch.cat([use.control.scale.expand(len(use.rows), -1) for use in uses])
        return {
            "sample": arrays["sample"][places, : self._bundle.latent_channels],
            "timestep": arrays["timestep"][places],
            **{name: arrays[name][places] for name in _TEXT if name in arrays},
            "control_embedding": embedding.numpy(),
            "conditioning_scale": scale.numpy(),
        }

    def _empty(self, rows: int, height: int, width: int) -> Arrays:
        """Residuals of zero."""
        bundle = self._bundle
        return {
            name: np.zeros((rows, channels, level_size(height, level), level_size(width, level)), np.float32)
            for name, (channels, level) in zip(bundle.residual_names, bundle.residuals, strict=True)
        }


def _uses(parts: Sequence[Part]) -> list[_Use]:
    """What acts on a batch at the current steps of its jobs."""
    uses, offset = [], 0
    for part in parts:
        pictures = part.job.pictures
        for control in part.job.controls():
            rows = [row for row in range(part.start, part.stop) if row >= control.first_row]
            if rows:
                places = [offset + row - part.start for row in rows]
                uses.append(_Use(control, places, [row % pictures for row in rows]))
        offset += part.stop - part.start
    return uses
