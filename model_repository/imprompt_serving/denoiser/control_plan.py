"""Plan which rows of a batch each ControlNet affects, once for all steps with the same rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from imprompt_serving.denoiser.batch import RowSlice, stack
from imprompt_serving.denoiser.control import PreparedControlNet
from imprompt_serving.denoiser.precision import DTYPES
from imprompt_serving.denoiser.windows import Window, select_frames
from imprompt_serving.specs import Bundle, CallRows, level_size

Tensors = dict[str, Tensor]
_TEXT = ("encoder_hidden_states", "text_embeds", "time_ids")


class ControlledRows(NamedTuple):
    """Rows `start` to `stop` of a batch that a ControlNet affects, with their pictures and window of frames."""

    control: PreparedControlNet
    start: int
    stop: int
    pictures: range
    window: Window | None

    def embedding(self) -> Tensor:
        """Return the embedded control images of these rows [rows, F, C, h, w]."""
        pictures = self.control.embedding[self.pictures.start : self.pictures.stop]
        return pictures if self.window is None else select_frames(pictures, self.window, axis=1)


def controlled_rows(slices: Sequence[RowSlice]) -> list[ControlledRows]:
    """Return the rows that each ControlNet affects in a batch of `slices`, at the current steps of their jobs."""
    found, start = [], 0
    for part in slices:
        controls = part.job.controls()
        for block in part.job.blocks(part.start, part.stop):
            stop = start + len(block.pictures)
            found += [
                ControlledRows(control, start, stop, block.pictures, block.window)
                for control in controls
                if block.conditioning.start >= control.first_row
            ]
            start = stop
    return found


class ControlPlan:
    """The calls of the ControlNets for one batch, with the inputs that stay the same from step to step.

    ControlNets work on frames: inside this class each frame of a row of the batch counts as a row. A picture has one.
    """

    def __init__(
        self,
        bundle: Bundle,
        call_rows: CallRows,
        controlled: list[ControlledRows],
        batch_rows: int,
        tensors: Tensors,
    ) -> None:
        """Plan the ControlNets for a batch.

        Args:
            batch_rows: rows of jobs in `tensors`, without the padding after them.
            tensors: the UNet inputs of the batch.
        """
        sample = tensors["sample"]
        self._channels = bundle.latent_channels
        self._controlled, self._sample, self._text = controlled, sample.shape, tensors["encoder_hidden_states"]
        self._device, self._dtype = sample.device, DTYPES[bundle.precision]
        self._frames = sample.shape[2] if sample.ndim == 5 else 1
        height, width = sample.shape[-2:]
        self._shapes = {
            name: (len(sample) * self._frames, channels, level_size(height, level), level_size(width, level))
            for name, (channels, level) in zip(bundle.residual_names, bundle.residuals, strict=True)
        }
        by_name: dict[str, list[ControlledRows]] = {}
        for rows in controlled:
            by_name.setdefault(rows.control.name, []).append(rows)
        self.nets = [self._net(name, own, batch_rows, call_rows, tensors) for name, own in by_name.items()]
        covered = [{row for span in net.spans for row in range(*span)} for net in self.nets]
        later = sorted(set().union(*covered) - covered[0]) if covered else []
        self._only_added_to = _join_spans((row, row + 1) for row in later)
        """Rows that later nets affect but the first one does not overwrite: they start at zero."""
        self._buffers: Tensors = {}

    def _net(
        self, name: str, controlled: list[ControlledRows], batch_rows: int, call_rows: CallRows, tensors: Tensors
    ) -> NetRows:
        frames = self._frames
        spans = _join_spans((part.start * frames, part.stop * frames) for part in controlled)
        if spans == [(0, batch_rows * frames)]:
            spans = [(0, self._sample[0] * frames)]  # a net that all jobs use also runs the padding of the batch
        rows = sum(stop - start for start, stop in spans)
        last = (rows - 1) % call_rows.most + 1
        net = NetRows(
            name=name,
            spans=spans,
            rows=rows - last + call_rows.padded(last),
            frames=frames,
            channels=self._channels,
        )
        scales = [part.control.scale.expand(part.stop - part.start, -1) for part in controlled]
        net.constant["control_embedding"] = stack(
            [part.embedding().flatten(0, 1) for part in controlled], net.rows
        ).contiguous()
        net.constant["conditioning_scale"] = stack(
            [_repeat_for_frames(scale, frames) for scale in scales], net.rows
        ).contiguous()
        net.constant.update({key: net.select(tensors[key]) for key in _TEXT if key in tensors})
        return net

    def fits(self, controlled: list[ControlledRows], tensors: Tensors) -> bool:
        """Return whether another step can use this plan."""
        same_rows = self._controlled == controlled and self._sample == tensors["sample"].shape
        return same_rows and self._text is tensors["encoder_hidden_states"]

    def covers_batch(self, net: NetRows, answer: Tensors) -> bool:
        """Return whether `answer`, of one call of `net`, has the residuals of all rows, ready for the UNet."""
        everywhere = net.spans == [(0, self._sample[0] * self._frames)]
        return everywhere and all(value.shape == self._shapes[name] for name, value in answer.items())

    def residual_buffers(self) -> Tensors:
        """Return buffers for the residuals of all rows, in the type of the networks.

        Rows that the first net does not overwrite are zero. Buffers are reused from step to step.
        """
        if not self._buffers:
            self._buffers = {
                name: torch.zeros(shape, dtype=self._dtype, device=self._device) for name, shape in self._shapes.items()
            }
        for start, stop in self._only_added_to:
            for buffer in self._buffers.values():
                buffer[start:stop].zero_()
        return self._buffers

    def unet_inputs(self, residuals: Tensors) -> Tensors:
        """Return residuals as UNet inputs: for clips, with an axis of frames [rows, F, C, h, w]."""
        if len(self._sample) == 4:
            return residuals
        return {name: value.unflatten(0, (-1, self._frames)) for name, value in residuals.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class NetRows:
    """One ControlNet in a batch: the rows that use it, and its inputs."""

    name: str
    spans: list[tuple[int, int]]
    """The rows that use it, as ascending spans."""
    rows: int
    """Rows of its calls in total: those of `spans`, and padding after them."""
    frames: int
    """Frames of a row of the batch."""
    channels: int
    """Channels of the latents, without the mask that inpainting UNets take."""
    constant: Tensors = field(default_factory=dict)
    """Inputs that stay the same from step to step."""

    def inputs(self, tensors: Tensors) -> Tensors:
        """Return the inputs of the net from those of the UNet, with one row for each frame."""
        sample = tensors["sample"][:, : self.channels]
        frames = sample if sample.ndim == 4 else sample.transpose(1, 2)
        return {
            "sample": stack(
                [rows if sample.ndim == 4 else rows.flatten(0, 1) for rows in self._batch_rows(frames)], self.rows
            ),
            "timestep": self.select(tensors["timestep"]),
            **self.constant,
        }

    def select(self, tensor: Tensor) -> Tensor:
        """Return the rows of `tensor` that use the net, once per frame: a view if they are contiguous pictures."""
        return stack([_repeat_for_frames(rows, self.frames) for rows in self._batch_rows(tensor)], self.rows)

    def destinations(self, first: int, count: int) -> Iterator[tuple[slice, slice]]:
        """Map rows of the net's output back to the batch, for a call that computes `count` rows from row `first`.

        Yields:
            Rows of the batch, and the rows of the call that belong there.
        """
        offset = -first
        for start, stop in self.spans:
            low, high = max(offset, 0), min(offset + stop - start, count)
            if low < high:
                yield slice(start - offset + low, start - offset + high), slice(low, high)
            offset += stop - start

    def _batch_rows(self, tensor: Tensor) -> list[Tensor]:
        """Return the rows of `tensor` that use the net; it has one for each row of the batch."""
        return [tensor[start // self.frames : stop // self.frames] for start, stop in self.spans]


def _repeat_for_frames(tensor: Tensor, frames: int) -> Tensor:
    """Repeat each row of `tensor` for each frame."""
    return tensor if frames == 1 else tensor[:, None].expand(-1, frames, *tensor.shape[1:]).flatten(0, 1)


def _join_spans(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join adjacent spans of rows, given in ascending order."""
    joined: list[tuple[int, int]] = []
    for start, stop in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = joined[-1][0], stop
        else:
            joined.append((start, stop))
    return joined
