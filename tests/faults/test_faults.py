"""The quick faults; `python -m faults` injects all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.cases import NOTICE_LIMIT_S, cases, run
from faults.server import Foreground, pick, wait_for
from imprompt import Client
from imprompt_demo import demo

BUNDLE = "world_lcm"
CASES = {case.name: case for case in cases(BUNDLE)}


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Foreground]:
    """`imprompt serve` with the smaller of the embedded bundles."""
    repository = demo.export_once(Path(str(request.config.cache.mkdir("demo"))))
    with Foreground(pick(repository, BUNDLE, tmp_path_factory.mktemp("repository"))) as server:
        yield server.wait_until_ready()


def test_canaries_are_not_logged_as_requests(server: Foreground) -> None:
    assert server.line_with('"event":"request"') is None
    with Client(server.addresses["grpc"]) as client:
        result = client.generate(model=BUNDLE, prompt="a house", num_inference_steps=1)
    wait_for(lambda: server.line_with(result.request_id), 10, "the line of the request")


@pytest.mark.parametrize("name", ["500 idle connections", "second server on the same ports"])
def test_server_withstands(server: Foreground, name: str) -> None:
    outcome = run(CASES[name], server, [BUNDLE], quiet=1.0)
    assert not outcome.seen
    assert not outcome.lost
    assert outcome.unanswered == 0


def test_server_recovers_from_a_dead_process(server: Foreground) -> None:
    outcome = run(CASES[f"kill -9 {BUNDLE}_denoiser"], server, [BUNDLE])
    assert outcome.noticed is not None
    assert outcome.noticed < NOTICE_LIMIT_S
    assert all(error.startswith(("Overloaded", "ConnectionFailed")) for error in outcome.seen)  # UNAVAILABLE
    assert not outcome.lost
    assert outcome.unanswered == 0
    status, health = server.health()
    assert status == 200
    assert health["restarts"] == 1
    assert len(server.leftovers()) == len(server.processes()) - 1  # a region for each model of the new server
