"""Copies to a device and back, beside what the loop has launched there."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from imprompt_serving.gpu import beside, download, upload

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
BUSY_CYCLES = 2 * 10**9
"""About a second of a GPU."""


def test_on_the_cpu_nothing_is_copied() -> None:
    tensor = torch.arange(3.0)
    with beside(CPU):
        assert upload(tensor, CPU) is tensor
        assert download(tensor) is tensor


@pytest.fixture
def busy() -> Iterator[torch.device]:
    """A GPU that the loop has given a second of work."""
    device = torch.device("cuda", 0)
    upload(torch.zeros(1), device)  # what is loaded and allocated at first use
    download(torch.zeros(1, device=device))
    torch.cuda.synchronize()
    torch.cuda._sleep(BUSY_CYCLES)
    yield device
    torch.cuda.synchronize()


@pytest.mark.gpu
@needs_gpu
def test_an_upload_waits_for_nothing_and_the_loop_for_it(busy: torch.device) -> None:
    began = time.perf_counter()
    there = upload(torch.arange(1000.0), busy)
    assert time.perf_counter() - began < 0.1
    assert torch.equal((there + 1).cpu(), torch.arange(1000.0) + 1)


@pytest.mark.gpu
@needs_gpu
def test_a_download_does_not_wait_for_what_was_launched_later(busy: torch.device) -> None:
    torch.cuda.synchronize()
    done = torch.arange(1000.0, device=busy) * 2
    torch.cuda.synchronize()
    torch.cuda._sleep(BUSY_CYCLES)
    began = time.perf_counter()
    assert torch.equal(download(done), torch.arange(1000.0) * 2)
    assert time.perf_counter() - began < 0.1


@pytest.mark.gpu
@needs_gpu
def test_what_is_launched_beside_the_loop_does_not_wait_for_it(busy: torch.device) -> None:
    began = time.perf_counter()
    with beside(busy):
        assert float(torch.ones(10, device=busy).sum()) == 10
    assert time.perf_counter() - began < 0.1
