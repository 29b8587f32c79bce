"""Copies to and from a device on which the loop has launched work."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from imprompt_serving.gpu import download, preparation_stream, upload

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
BUSY_CYCLES = 2 * 10**9
"""GPU cycles for about a second of work."""


def test_nothing_is_copied_on_the_cpu() -> None:
    tensor = torch.arange(3.0)
    with preparation_stream(CPU):
        assert upload(tensor, CPU) is tensor
        assert download(tensor) is tensor


@pytest.fixture
def busy() -> Iterator[torch.device]:
    """A GPU on which the loop has launched a second of work."""
    device = torch.device("cuda", 0)
    upload(torch.zeros(1), device)  # first use loads and allocates
    download(torch.zeros(1, device=device))
    torch.cuda.synchronize()
    torch.cuda._sleep(BUSY_CYCLES)
    yield device
    torch.cuda.synchronize()


@pytest.mark.gpu
@needs_gpu
def test_an_upload_does_not_wait_but_the_loop_waits_for_it(busy: torch.device) -> None:
    began = time.perf_counter()
    there = upload(torch.arange(1000.0), busy)
    assert time.perf_counter() - began < 0.1
    assert torch.equal((there + 1).cpu(), torch.arange(1000.0) + 1)


@pytest.mark.gpu
@needs_gpu
def test_a_download_does_not_wait_for_later_work(busy: torch.device) -> None:
    torch.cuda.synchronize()
    done = torch.arange(1000.0, device=busy) * 2
    torch.cuda.synchronize()
    torch.cuda._sleep(BUSY_CYCLES)
    began = time.perf_counter()
    assert torch.equal(download(done), torch.arange(1000.0) * 2)
    assert time.perf_counter() - began < 0.1


@pytest.mark.gpu
@needs_gpu
def test_preparation_does_not_wait_for_the_loop(busy: torch.device) -> None:
    began = time.perf_counter()
    with preparation_stream(busy):
        assert float(torch.ones(10, device=busy).sum()) == 10
    assert time.perf_counter() - began < 0.1
