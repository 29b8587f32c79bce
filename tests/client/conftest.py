"""The fake server, and clients of it that do not wait between retries."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_triton import FakeTriton, running

from imprompt import Client, _retry


@pytest.fixture
def triton() -> FakeTriton:
    return FakeTriton()


@pytest.fixture
def url(triton: FakeTriton, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(_retry, "FIRST_DELAY_S", 0.01)
    with running(triton) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client
