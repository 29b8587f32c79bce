"""Engine runners on a GPU: tensors stay on the device between calls. Loads torch; lighter processes do without."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from imprompt_serving.backends import Engine

Shapes = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and shapes of a call's inputs: calls that are alike in them can share buffers and CUDA graphs."""


@runtime_checkable
class DeviceEngine(Protocol):
    """An engine that takes and gives tensors where they are."""

    def run_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One call on the engine's device. The answer is the caller's own."""
        ...


@runtime_checkable
class LoraEngine(Protocol):
    """An engine whose weights LoRAs can change between calls."""

    def use_loras(self, scales: Mapping[str, float]) -> None:
        """Compute the next calls with LoRAs of these scales, and no others. The same LoRAs again cost nothing."""
        ...


def cuda_or_cpu(index: int) -> torch.device:
    """The GPU of this number; the CPU where there is no GPU."""
    return torch.device("cuda", index) if torch.cuda.is_available() else torch.device("cpu")


def mark(device: torch.device) -> Callable[[], None] | None:
    """What waits until `device` has done all that was launched on it so far; None for the CPU, which has already."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event.synchronize


def beside(device: torch.device) -> AbstractContextManager[object]:
    """Within, what this thread launches on `device` runs beside the loop, which launches on the default stream."""
    return torch.cuda.stream(_stream(device, "beside")) if device.type == "cuda" else nullcontext()


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy `tensor` from the CPU to `device`, for the loop: what it launches next waits for the copy.

    The host does not. A copy out of memory that is not pinned would wait for all that the device has been given to do.
    """
    if device.type != "cuda":
        return tensor.to(device, non_blocking=True)
    stream, loop = _stream(device, "upload"), torch.cuda.default_stream(device)
    with torch.cuda.stream(stream):
        there = tensor.pin_memory().to(device, non_blocking=True)
    loop.wait_stream(stream)
    there.record_stream(loop)
    return there


def download(tensor: Tensor) -> Tensor:
    """`tensor` on the host; waits for the copy, and for nothing that was launched after `tensor` was complete.

    It has to be complete: what `mark` gave for the tick that computes it has returned.
    """
    if not tensor.is_cuda:
        return tensor
    stream = _stream(tensor.device, "download")
    with torch.cuda.stream(stream):
        here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        here.copy_(tensor, non_blocking=True)
        copied = stream.record_event(torch.cuda.Event(blocking=True))
    copied.synchronize()
    return here


@cache
def _stream(device: torch.device, purpose: str) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def run_on_tensors(engine: Engine, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run `engine` on torch tensors: in place on their device if it can, or else through arrays."""
    if isinstance(engine, DeviceEngine):
        return engine.run_tensors(tensors)
    answer = engine.run({name: tensor.contiguous().numpy() for name, tensor in tensors.items()})
    return {name: torch.from_numpy(value) for name, value in answer.items()}


def key_of(tensors: Mapping[str, Tensor]) -> Shapes:
    return tuple((name, tuple(tensor.shape)) for name, tensor in sorted(tensors.items()))
