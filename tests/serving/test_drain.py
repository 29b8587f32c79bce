"""The drain file, whether the launcher or a hook wrote it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from imprompt_serving.drain import DRAIN_FILE_VARIABLE, admitted, announce_drain, check_drain_deadline, drain_deadline
from imprompt_serving.errors import Overloaded


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(DRAIN_FILE_VARIABLE, str(tmp_path / "drain"))
    return tmp_path / "drain"


def test_no_file_means_no_drain(file: Path) -> None:
    assert drain_deadline() is None
    check_drain_deadline()


def test_running_requests_may_continue_until_the_deadline(file: Path) -> None:
    announce_drain(file, deadline=time.time() + 60)
    check_drain_deadline()
    with pytest.raises(Overloaded), admitted(lambda change: None):
        pass


@pytest.mark.parametrize("text", [b"", b"\n", b"now", b"nan", b"\xff\xfe", b"-inf", b"0"], ids=repr)
def test_file_without_a_time_means_now(file: Path, text: bytes) -> None:
    """For example, a hook that creates the file with `>` leaves it empty."""
    file.write_bytes(text)
    with pytest.raises(Overloaded, match="did not finish before the deadline"):
        check_drain_deadline()
    counted: list[float] = []
    with pytest.raises(Overloaded, match="accepts no new requests"), admitted(counted.append):
        pass
    assert sum(counted) == 0


def test_unreadable_file_means_now(file: Path) -> None:
    file.mkdir()
    with pytest.raises(Overloaded):
        check_drain_deadline()
