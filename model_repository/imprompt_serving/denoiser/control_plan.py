"""The rows of a batch that ControlNets act on, planned once for all steps that have the same rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from imprompt_serving.denoiser.batch import RowSlice, stack
from imprompt_serving.denoiser.control import PreparedControlNet
from imprompt_serving.denoiser.precision import DTYPES
from imprompt_serving.denoiser.windows import Window, frames_of
from imprompt_serving.specs import Bundle, CallRows, level_size

Tensors = dict[str, Tensor]
_TEXT = ("encoder_hidden_states", "text_embeds", "time_ids")


class Use(NamedTuple):
    """A control that acts on rows `start` to `stop` of a batch: on these pictures of its job, and frames of a clip."""

    control: PreparedControlNet
    start: int
    stop: int
    pictures: range
    window: Window | None

    def embedding(self) -> Tensor:
        """Features of the control images of these rows [rows, F, C, h, w]."""
        pictures = self.control.embedding[self.pictures.start : self.pictures.stop]
        return pictures if self.window is None else frames_of(pictures, self.window, 1)


def uses_of(parts: Sequence[RowSlice]) -> list[Use]:
    """What acts on a batch at the current steps of its jobs."""
    uses, start = [], 0
    for part in parts:
        controls = part.job.controls()
        for block in part.job.blocks(part.start, part.stop):
            stop = start + len(block.pictures)
            uses += [
                Use(control, start, stop, block.pictures, block.window)
                for control in controls
                if block.conditioning.start >= control.first_row
            ]
            start = stop
    return uses


class ControlPlan:
    """What the ControlNets of a batch do, and what they take that stays from step to step.

    Within, a row is a frame of a row of the batch; for pictures that is the same.
    """

    def __init__(self, bundle: Bundle, call_rows: CallRows, uses: list[Use], batch_rows: int, tensors: Tensors) -> None:
        """`batch_rows` are the rows of jobs in `tensors`, which may have more, for padding."""
        sample = tensors["sample"]
        self._channels = bundle.latent_channels
        self._uses, self._sample, self._text = uses, sample.shape, tensors["encoder_hidden_states"]
        self._device, self._dtype = sample.device, DTYPES[bundle.precision]
        self._frames = sample.shape[2] if sample.ndim == 5 else 1
        height, width = sample.shape[-2:]
        self._shapes = {
            name: (len(sample) * self._frames, channels, level_size(height, level), level_size(width, level))
            for name, (channels, level) in zip(bundle.residual_names, bundle.residuals, strict=True)
        }
        by_name: dict[str, list[Use]] = {}
        for use in uses:
            by_name.setdefault(use.control.name, []).append(use)
        self.nets = [self._net(name, own, batch_rows, call_rows, tensors) for name, own in by_name.items()]
        rows = [{row for span in net.spans for row in range(*span)} for net in self.nets]
        self._added = _joined((row, row + 1) for row in sorted(set().union(*rows) - rows[0])) if rows else []
        """Rows that a net adds to, but not the first one, which writes to its own."""
        self._buffers: Tensors = {}

    def _net(self, name: str, uses: list[Use], batch_rows: int, call_rows: CallRows, tensors: Tensors) -> NetRows:
        frames = self._frames
        spans = _joined((use.start * frames, use.stop * frames) for use in uses)
        if spans == [(0, batch_rows * frames)]:
            spans = [(0, self._sample[0] * frames)]  # a net that all jobs use runs the padding of the batch, too
        rows = sum(stop - start for start, stop in spans)
        last = (rows - 1) % call_rows.most + 1
        net = NetRows(
            name=name,
            spans=spans,
            rows=rows - last + call_rows.padded(last),
            frames=frames,
            channels=self._channels,
        )
        scales = [use.control.scale.expand(use.stop - use.start, -1) for use in uses]
        net.constant["control_embedding"] = stack(
            [use.embedding().flatten(0, 1) for use in uses], net.rows
        ).contiguous()
        net.constant["conditioning_scale"] = stack(
            [_by_frame(scale, frames) for scale in scales], net.rows
        ).contiguous()
        net.constant.update({key: net.own(tensors[key]) for key in _TEXT if key in tensors})
        return net

    def fits(self, uses: list[Use], tensors: Tensors) -> bool:
        """Whether this is also the plan for another step."""
        same_rows = self._uses == uses and self._sample == tensors["sample"].shape
        return same_rows and self._text is tensors["encoder_hidden_states"]

    def is_whole(self, net: NetRows, answer: Tensors) -> bool:
        """Whether the answer of one call of `net` is what the UNet takes, as it is."""
        everywhere = net.spans == [(0, self._sample[0] * self._frames)]
        return everywhere and all(value.shape == self._shapes[name] for name, value in answer.items())

    def cleared(self) -> Tensors:
        """Residuals to write those of the first net to: zeros in all other rows."""
        if not self._buffers:
            self._buffers = {
                name: torch.zeros(shape, dtype=self._dtype, device=self._device) for name, shape in self._shapes.items()
            }
        for start, stop in self._added:
            for buffer in self._buffers.values():
                buffer[start:stop].zero_()
        return self._buffers

    def by_row(self, residuals: Tensors) -> Tensors:
        """Residuals of frames as inputs of the UNet: those of clips with their frames [rows, F, C, h, w]."""
        if len(self._sample) == 4:
            return residuals
        return {name: value.unflatten(0, (-1, self._frames)) for name, value in residuals.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class NetRows:
    """One ControlNet in a batch: the rows that use it, as ascending spans, and what it takes at each of their steps."""

    name: str
    spans: list[tuple[int, int]]
    rows: int
    """Rows of its calls together: those of `spans`, and padding after them."""
    frames: int
    channels: int
    """Of the latents: without the mask that inpainting UNets take."""
    constant: Tensors = field(default_factory=dict)

    def inputs(self, tensors: Tensors) -> Tensors:
        """Inputs of the net, a row for each frame."""
        sample = tensors["sample"][:, : self.channels]
        frames = sample if sample.ndim == 4 else sample.transpose(1, 2)
        return {
            "sample": stack([rows if sample.ndim == 4 else rows.flatten(0, 1) for rows in self._of(frames)], self.rows),
            "timestep": self.own(tensors["timestep"]),
            **self.constant,
        }

    def own(self, tensor: Tensor) -> Tensor:
        """The rows of `tensor` that use the net, each as often as it has frames: a view where they lie together."""
        return stack([_by_frame(rows, self.frames) for rows in self._of(tensor)], self.rows)

    def places(self, first: int, count: int) -> Iterator[tuple[slice, slice]]:
        """Where `count` rows from `first` of the net's answers belong: rows of the batch, and rows of these."""
        offset = -first
        for start, stop in self.spans:
            low, high = max(offset, 0), min(offset + stop - start, count)
            if low < high:
                yield slice(start - offset + low, start - offset + high), slice(low, high)
            offset += stop - start

    def _of(self, tensor: Tensor) -> list[Tensor]:
        """The rows of `tensor`, one for each row of the batch, that use the net."""
        return [tensor[start // self.frames : stop // self.frames] for start, stop in self.spans]


def _by_frame(tensor: Tensor, frames: int) -> Tensor:
    """Each row of `tensor` as often as there are frames."""
    return tensor if frames == 1 else tensor[:, None].expand(-1, frames, *tensor.shape[1:]).flatten(0, 1)


def _joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ascending spans of rows, those that touch as one."""
    joined: list[tuple[int, int]] = []
    for start, stop in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = joined[-1][0], stop
        else:
            joined.append((start, stop))
    return joined
