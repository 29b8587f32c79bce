"""Several servers behind Envoy: no request is lost while members die, hang, drain, and join."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator

import pytest

from bundles import ExportedBundle
from faults.callers import Callers
from faults.server import wait_for
from fleet.proxy import Envoy, Member
from imprompt import Client, Progress

pytest.importorskip("envoy", reason="needs the extra `fleet`: make fleet")

CALLERS = 16


@pytest.fixture(scope="module")
def fleet(
    bundle: Callable[[str], ExportedBundle], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[list[Member], Envoy]]:
    """Start three servers and Envoy, which also knows a fourth one that is not there yet."""
    repository = bundle("sd15").repository
    members = [Member(repository, f"127.0.0.{number}") for number in (2, 3, 4, 5)]
    try:
        for member in members[:3]:
            member.start()
        with Envoy(members, tmp_path_factory.mktemp("envoy")) as envoy:
            for member in members[:3]:
                assert member.server is not None
                member.server.wait_until_ready()
            envoy.wait_until(lambda healthy: len(healthy) == 3, "three members are healthy")
            yield members, envoy
    finally:
        for member in members:
            member.stop()


def test_cancellation_reaches_the_member(fleet: tuple[list[Member], Envoy]) -> None:
    members, envoy = fleet

    def cancelled() -> float:
        return sum(
            member.metric('imprompt_jobs_ended_total{model="sd15_denoiser",outcome="cancelled"')
            for member in members[:3]
        )

    before = cancelled()
    with Client(envoy.address) as client:
        events = client.stream(model="sd15", prompt="a cat", num_inference_steps=900)
        assert isinstance(next(events), Progress)
        events.close()
    wait_for(lambda: cancelled() == before + 1, 10, "the job is cancelled")


def test_load_is_even_by_rows(fleet: tuple[list[Member], Envoy]) -> None:
    members, envoy = fleet
    before = [member.metric("imprompt_tick_rows_sum") for member in members[:3]]
    with Callers(envoy.address, ["sd15"], count=CALLERS, num_inference_steps=6) as callers:
        wait_for(lambda: len(callers.pictures()) >= 150, 300, "150 pictures")
    rows = [member.metric("imprompt_tick_rows_sum") - old for member, old in zip(members, before, strict=False)]
    mean = sum(rows) / len(rows)
    assert all(abs(each - mean) <= 0.2 * mean for each in rows), rows


def test_no_request_is_lost(fleet: tuple[list[Member], Envoy]) -> None:
    """A member is killed, one hangs, one drains, and another one joins, while 16 callers make pictures."""
    members, envoy = fleet
    killed, hung, drained, added = members

    with Callers(envoy.address, ["sd15"], count=CALLERS, num_inference_steps=4) as callers:

        def more() -> None:
            enough = len(callers.pictures()) + CALLERS
            wait_for(lambda: len(callers.pictures()) >= enough, 120, "callers get pictures")

        more()
        assert killed.server is not None
        killed.server.processes()["sd15_denoiser"].send_signal(signal.SIGKILL)
        envoy.wait_until(lambda healthy: killed.host not in healthy, "Envoy notices the dead member", 20)
        more()
        killed.stop()
        killed.start().wait_until_ready()
        envoy.wait_until(lambda healthy: killed.host in healthy, "the member is back")
        assert hung.server is not None
        hung.server.processes()["sd15_denoiser"].send_signal(signal.SIGSTOP)
        envoy.wait_until(lambda healthy: hung.host not in healthy, "Envoy notices the hung member", 30)
        more()
        added.start().wait_until_ready()
        envoy.wait_until(lambda healthy: added.host in healthy, "Envoy finds the new member")
        assert drained.server is not None
        drained.server.process.terminate()
        envoy.wait_until(lambda healthy: drained.host not in healthy, "Envoy notices the drain", 20)
        more()
        assert drained.server.process.wait(60) == 0
        callers.stop()
    assert callers.lost() == []
    assert len(callers.pictures()) >= 4 * CALLERS
