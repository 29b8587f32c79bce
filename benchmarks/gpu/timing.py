"""Seconds of calls: of the device, between events on it, or of the clock on the wall."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch

WARM_UP = 3


def device_seconds(call: Callable[[], object], device: str, repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls on the device, which are launched without waiting between them."""
    for _ in range(WARM_UP):
        call()
    if device == "cpu":
        return wall_seconds(call, device, repeats, warm_up=0)
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1000 for begin, end in itertools.pairwise(marks)]


def wall_seconds(call: Callable[[], object], device: str, repeats: int, *, warm_up: int = 1) -> list[float]:
    """Seconds from each call until the device is done with it."""
    found = []
    for index in range(warm_up + repeats):
        began = time.perf_counter()
        call()
        synchronize(device)
        if index >= warm_up:
            found.append(time.perf_counter() - began)
    return found


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def torch_device(device: str) -> torch.device:
    """The device with its number, as the server has it."""
    return torch.device("cpu" if device == "cpu" else "cuda:0")


def fewer(repeats: int) -> int:
    """Repeats of what takes as long as a picture."""
    return max(repeats // 10, 2)
