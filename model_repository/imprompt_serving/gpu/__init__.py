"""Engine runners on a GPU: tensors stay on the device between calls. Loads torch; lighter processes do without."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy `tensor` from the CPU to `device`, in the order of the current stream.

    A copy out of memory that is not pinned would wait for all that the device has been given to do.
    """
    pinned = tensor.pin_memory() if device.type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)


def run_on_tensors(engine: Engine, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run `engine` on torch tensors: in place on their device if it can, or else through arrays."""
    if isinstance(engine, DeviceEngine):
        return engine.run_tensors(tensors)
    answer = engine.run({name: tensor.contiguous().numpy() for name, tensor in tensors.items()})
    return {name: torch.from_numpy(value) for name, value in answer.items()}


def key_of(tensors: Mapping[str, Tensor]) -> Shapes:
    return tuple((name, tuple(tensor.shape)) for name, tensor in sorted(tensors.items()))
