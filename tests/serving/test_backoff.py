"""How long the launcher waits before it restarts a process."""

from __future__ import annotations

from imprompt_serving.launcher import Backoff


def test_pauses_double_while_a_process_cannot_start() -> None:
    backoff = Backoff()
    assert [backoff.next_pause(0) for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]


def test_pauses_start_over_after_a_good_run() -> None:
    backoff = Backoff()
    assert [backoff.next_pause(run) for run in (100, 9.9, 0, 9.9, 10, 10, 9.9)] == [1, 2, 4, 8, 1, 1, 2]
