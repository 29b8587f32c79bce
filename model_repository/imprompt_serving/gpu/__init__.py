"""Run engines on a GPU with tensors that stay on the device between calls. Imports torch, unlike `backends`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from imprompt_serving.backends import Engine

CallShapes = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and shapes of a call's inputs. Calls with equal shapes can share buffers and CUDA graphs."""


@runtime_checkable
class DeviceEngine(Protocol):
    """An engine that takes and returns torch tensors on its device."""

    def run_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one call on the engine's device. The caller owns the outputs."""
        ...


@runtime_checkable
class LoraEngine(Protocol):
    """An engine whose weights can be changed by LoRAs between calls."""

    def use_loras(self, scales: Mapping[str, float]) -> None:
        """Run the next calls with LoRAs of these scales, and no others. If nothing changes, this does nothing."""
        ...


def cuda_or_cpu(index: int) -> torch.device:
    """Return the GPU with this index, or the CPU if there is no GPU."""
    return torch.device("cuda", index) if torch.cuda.is_available() else torch.device("cpu")


def record_launch(device: torch.device) -> Callable[[], None] | None:
    """Return a function that waits for everything launched on `device` so far, or None for the CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event.synchronize


def preparation_stream(device: torch.device) -> AbstractContextManager[object]:
    """Launch work of this thread on a separate stream within the context. The loop uses the default stream."""
    return torch.cuda.stream(_stream(device, "preparation")) if device.type == "cuda" else nullcontext()


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy `tensor` from the CPU to `device` for the loop, whose next launches wait for the copy.

    The host does not wait. From memory that is not pinned, it would wait for everything that is queued on the device.
    """
    if device.type != "cuda":
        return tensor.to(device, non_blocking=True)
    stream, loop = _stream(device, "upload"), torch.cuda.default_stream(device)
    with torch.cuda.stream(stream):
        copied = tensor.pin_memory().to(device, non_blocking=True)
    loop.wait_stream(stream)
    copied.record_stream(loop)
    return copied


def download(tensor: Tensor) -> Tensor:
    """Copy `tensor` to the host and wait for the copy, but not for any later work on the device.

    The tensor must be complete: the function from `record_launch` for the tick that computes it has returned.
    """
    if not tensor.is_cuda:
        return tensor
    stream = _stream(tensor.device, "download")
    with torch.cuda.stream(stream):
        on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        on_host.copy_(tensor, non_blocking=True)
        copied = stream.record_event(torch.cuda.Event(blocking=True))
    copied.synchronize()
    return on_host


@cache
def _stream(device: torch.device, purpose: str) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def run_on_tensors(engine: Engine, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run `engine` on torch tensors: on their device if it can, or else by way of numpy arrays."""
    if isinstance(engine, DeviceEngine):
        return engine.run_tensors(tensors)
    answer = engine.run({name: to_array(tensor.contiguous()) for name, tensor in tensors.items()})
    return {name: torch.from_numpy(value) for name, value in answer.items()}


def to_array(tensor: Tensor) -> np.ndarray:
    """Copy `tensor` to an array on the host. bf16 becomes float32, because numpy has no bf16."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()


def call_shapes(tensors: Mapping[str, Tensor]) -> CallShapes:
    """Return the names and shapes of `tensors`, sorted by name."""
    return tuple((name, tuple(tensor.shape)) for name, tensor in sorted(tensors.items()))
