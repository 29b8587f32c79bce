"""Several servers behind Envoy: no request is lost while members die, hang, drain, and join."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from bundles import ExportedBundle
from faults.callers import Callers
from faults.server import wait_for
from fleet.proxy import Member, wait_until
from imprompt import Client, Progress
from imprompt_bench.fleet.envoy import Envoy
from imprompt_bench.fleet.measure import compare
from imprompt_bench.fleet.members import RowsWatcher
from imprompt_bench.fleet.routings import routings
from imprompt_bench.fleet.traffic import MIX
from imprompt_bench.workload import Workload

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
        with Envoy([str(member) for member in members], tmp_path_factory.mktemp("envoy")) as envoy:
            for member in members[:3]:
                assert member.server is not None
                member.server.wait_until_ready()
            wait_until(envoy, lambda healthy: len(healthy) == 3, "three members are healthy")
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


@pytest.fixture(scope="module")
def watcher(fleet: tuple[list[Member], Envoy]) -> Iterator[RowsWatcher]:
    addresses = [member.server.addresses for member in fleet[0] if member.server is not None]
    with RowsWatcher([(each["grpc"], each["metrics"]) for each in addresses]) as watching:
        yield watching


def test_load_is_even_by_rows(fleet: tuple[list[Member], Envoy], watcher: RowsWatcher) -> None:
    """Outstanding rows are even, on average over time. The rows of a member that gets less of the CPU take longer."""
    _, envoy = fleet
    with Callers(envoy.address, ["sd15"], count=CALLERS, num_inference_steps=6) as callers:
        wait_for(lambda: len(callers.pictures()) >= CALLERS, 120, "callers get pictures")
        with watcher.record() as series:
            wait_for(lambda: len(callers.pictures()) >= 150, 300, "150 pictures")
    rows = np.mean(series, axis=0)
    assert np.abs(rows - rows.mean()).max() <= 0.2 * rows.mean(), rows


def test_ways_of_routing(fleet: tuple[list[Member], Envoy], watcher: RowsWatcher, tmp_path: Path) -> None:
    """Envoy takes each configuration of `imprompt bench routing`, and sends requests to all members."""
    members = [f"{member.host}:{member.grpc_port}" for member in fleet[0][:3]]
    with ExitStack() as stack:
        envoys = {
            name: stack.enter_context(Envoy([f"{member}:1" for member in members], tmp_path, change))
            for name, change in routings(members, watcher.port).items()
        }
        workload = Workload(model="sd15", adapter="plain", size=64, steps=2, smallest=32)
        pictures = tuple(kind for kind in MIX if kind.frames == 1)
        measured = compare(envoys, watcher, workload, 24, mix=pictures, rounds=1)
        for measurement, envoy in zip(measured, envoys.values(), strict=True):
            assert [sample.status for sample in measurement.samples] == ["ok"] * 24, measurement.label
            assert measurement.notes["busiest"] >= 1
            (cluster,) = json.loads(envoy.get("/clusters?format=json"))["cluster_statuses"]
            sent = [
                int(stat.get("value", 0))
                for host in cluster["host_statuses"]
                for stat in host["stats"]
                if stat["name"] == "rq_total"
            ]
            assert len(sent) == 3
            assert min(sent) >= 5, (measurement.label, sent)
        reports = [
            int(line.rpartition(" ")[2])
            for line in envoys["weights by load reports"].get("/stats?filter=lb_orca_oob").splitlines()
            if "report" in line
        ]
        assert sum(reports) > 10, "no load reports reach Envoy"


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
        wait_until(envoy, lambda healthy: killed.host not in healthy, "Envoy notices the dead member", 20)
        more()
        killed.stop()
        killed.start().wait_until_ready()
        wait_until(envoy, lambda healthy: killed.host in healthy, "the member is back")
        assert hung.server is not None
        hung.server.processes()["sd15_denoiser"].send_signal(signal.SIGSTOP)
        wait_until(envoy, lambda healthy: hung.host not in healthy, "Envoy notices the hung member", 30)
        more()
        added.start().wait_until_ready()
        wait_until(envoy, lambda healthy: added.host in healthy, "Envoy finds the new member")
        assert drained.server is not None
        drained.server.process.terminate()
        wait_until(envoy, lambda healthy: drained.host not in healthy, "Envoy notices the drain", 20)
        more()
        assert drained.server.process.wait(60) == 0
        callers.stop()
    assert callers.lost() == []
    assert len(callers.pictures()) >= 4 * CALLERS
