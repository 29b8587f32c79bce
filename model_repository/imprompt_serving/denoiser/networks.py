"""The networks of one denoising step: ControlNets, then a UNet, all in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from imprompt_serving.backends import Engine
from imprompt_serving.denoiser.batch import RowSlice
from imprompt_serving.denoiser.control import PreparedControlNet
from imprompt_serving.denoiser.protocol import LoopJob
from imprompt_serving.gpu import run_on_tensors
from imprompt_serving.specs import Bundle, level_size

Tensors = dict[str, Tensor]
_TEXT = ("encoder_hidden_states", "text_embeds", "time_ids")


class _Use(NamedTuple):
    """A control that acts on rows of a batch, and its features of the frames of these rows [rows, F, C, h, w]."""

    control: PreparedControlNet
    rows: list[int]
    embedding: Tensor


class StepNetworks:
    """The UNets of a bundle (that for pictures, and that for clips) and its ControlNets, by name.

    Rows without control share the call of rows with it, with residuals of zero: adding them costs next to nothing,
    while a call of its own would cost a whole pass over the weights.
    """

    def __init__(self, bundle: Bundle, unets: Mapping[str, Engine], controlnets: Mapping[str, Engine]) -> None:
        self._bundle, self._unets, self._controlnets = bundle, unets, controlnets
        self._zeros: Tensors = {}
        self._zeros_of: tuple[int, ...] = ()

    def __call__(self, parts: Sequence[RowSlice], inputs: Mapping[str, Tensor]) -> Tensor:
        """The noise that the UNet predicts for ``inputs``, the rows of ``parts`` one after the other."""
        tensors = dict(inputs)
        clips = tensors["sample"].ndim == 5
        if self._bundle.controlnets:
            tensors |= self._residuals(parts, tensors, clips)
        unet = self._unets["motion_unet" if clips else "unet"]
        return run_on_tensors(unet, tensors)["noise_pred"]

    def _residuals(self, parts: Sequence[RowSlice], tensors: Tensors, clips: bool) -> Tensors:
        """What the ControlNets of all rows add; each net runs once, over the rows that use it."""
        uses = _uses(parts)
        rows, frames = tensors["sample"].shape[0], tensors["sample"].shape[2] if clips else 1
        size = (rows, frames, *tensors["sample"].shape[-2:])
        device = tensors["sample"].device
        if uses:
            total = self._empty(size, device)
            for name in dict.fromkeys(use.control.name for use in uses):
                self._add(total, name, [use for use in uses if use.control.name == name], tensors)
        else:
            if self._zeros_of != size:
                self._zeros, self._zeros_of = self._empty(size, device), size
            total = self._zeros
        return total if clips else {name: value[:, 0] for name, value in total.items()}

    def _add(self, total: Tensors, name: str, uses: list[_Use], tensors: Tensors) -> None:
        """Add what ControlNet ``name`` says of the rows that use it, a slice of its frames at a time."""
        inputs = self._control_inputs(uses, tensors)
        places = [row for use in uses for row in use.rows]
        frames, limit = len(inputs["sample"]) // len(places), self._bundle.shapes.rows.max
        for first in range(0, len(inputs["sample"]), limit):
            answer = run_on_tensors(
                self._controlnets[name], {key: value[first : first + limit] for key, value in inputs.items()}
            )
            for residual, value in answer.items():
                index = torch.arange(first, first + len(value))
                total[residual][torch.tensor(places)[index // frames], index % frames] += value

    def _control_inputs(self, uses: list[_Use], tensors: Tensors) -> Tensors:
        """Inputs of one ControlNet, a row for each frame; without the mask that inpainting UNets take."""
        places = [row for use in uses for row in use.rows]
        embedding = torch.cat([use.embedding for use in uses])
        scale = torch.cat([use.control.scale.expand(len(use.rows), -1) for use in uses])
        sample = tensors["sample"][places, : self._bundle.latent_channels]
        if sample.ndim == 5:
            sample = sample.transpose(1, 2).flatten(0, 1)
        frames = embedding.shape[1]
        by_row = {name: tensors[name][places] for name in ("timestep", *_TEXT) if name in tensors}
        by_row["conditioning_scale"] = scale
        by_frame = {name: value.repeat_interleave(frames, dim=0) for name, value in by_row.items()}
        return {"sample": sample, "control_embedding": embedding.flatten(0, 1), **by_frame}

    def _empty(self, size: tuple[int, ...], device: torch.device) -> Tensors:
        """Residuals of zero [rows, F, C, h, w] for latents of ``size`` (rows, frames, height, width)."""
        rows, frames, height, width = size
        return {
            name: torch.zeros(
                rows, frames, channels, level_size(height, level), level_size(width, level), device=device
            )
            for name, (channels, level) in zip(self._bundle.residual_names, self._bundle.residuals, strict=True)
        }


def _uses(parts: Sequence[RowSlice]) -> list[_Use]:
    """What acts on a batch at the current steps of its jobs."""
    uses, offset = [], 0
    for part in parts:
        job, span = part.job, range(part.start, part.stop)
        own_rows = dict(zip(span, job.conditioning_rows(part.start, part.stop), strict=True))
        for control in job.controls():
            rows = [row for row, own in own_rows.items() if own >= control.first_row]
            if rows:
                features = [_frames(job, control.embedding[row % job.pictures], row) for row in rows]
                uses.append(_Use(control, [offset + row - part.start for row in rows], torch.stack(features)))
        offset += part.stop - part.start
    return uses


def _frames(job: LoopJob, embedding: Tensor, row: int) -> Tensor:
    """Of the features of a clip's control images [F, C, h, w], those of the frames of ``row``."""
    if len(job.windows) < 2:
        return embedding
    return embedding[list(job.windows[row // (job.rows // len(job.windows))])]
