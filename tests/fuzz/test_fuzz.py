"""A short version of `make fuzz`. The cases are always the same, and no verdict depends on timing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from fuzz import soak
from fuzz.cases import KINDS, case
from fuzz.processes import growth
from fuzz.runner import Harness, run
from fuzz.target import Target, read_targets
from fuzz.transports import Answer
from fuzz.verdicts import verdict
from served import Served

CASES = 300
MAX_GROWTH_MB = 64.0


@pytest.fixture(scope="module")
def harness(served: Callable[[str], Served]) -> Iterator[Harness]:
    """The bundle with the most features: ControlNets, a T2I-Adapter, clips and an image prompt."""
    control = served("control")
    targets = read_targets(control.bundle.repository)
    with Harness(control.server, targets) as harness:
        harness.warm_up()
        yield harness


def test_hostile_requests_do_not_harm_the_server(harness: Harness) -> None:
    report = run(harness, (case(0, index, harness.targets) for index in range(CASES)))
    assert not report.failures, "\n" + report.causes()
    assert report.cases == CASES
    assert {kind for kind, _ in report.answers} == KINDS.keys() - {"http"}


def test_refused_streams_and_canceled_calls_leak_no_memory(harness: Harness) -> None:
    refused = soak.refusals(harness, 100)
    assert not refused.failures
    assert refused.statuses == {"InvalidRequest": 100}
    assert growth(refused.before, refused.after) < MAX_GROWTH_MB
    canceled = soak.cancels(harness, 30, before=refused.after)
    assert not canceled.failures
    assert canceled.statuses["LEFT"] > 10
    assert growth(canceled.before, canceled.after) < MAX_GROWTH_MB


@pytest.fixture(scope="module")
def target(bundle: Callable[[str], object]) -> Target:
    return read_targets(bundle("control").repository)[0]  # type: ignore[attr-defined]


def test_cases_are_reproducible(target: Target) -> None:
    for index in range(50):
        assert str(case(3, index, [target])) == str(case(3, index, [target]))
        assert str(case(3, index, [target])) != str(case(4, index, [target]))


@pytest.mark.parametrize(
    ("kind", "answer", "expected"),
    [
        ("unary", Answer(status="INVALID_ARGUMENT", message="height: must be 64 to 128, got 3"), None),
        ("unary", Answer(status="INTERNAL", message="ZeroDivisionError: division by zero"), "internal"),
        ("unary", Answer(status="INTERNAL", message="Unable to parse request"), None),
        (
            "unary",
            Answer(status="INVALID_ARGUMENT", message="image: <_io.BytesIO object at 0x7f2497305a80>"),
            "address",
        ),
        ("unary", Answer(status="INVALID_ARGUMENT", message="x: " + "y" * 1_200), "long message"),
        ("unary", Answer(status="OK", seconds=89.5), "hang"),
        ("stream", Answer(status="SILENT"), "silent"),
        ("sdk", Answer(status="FOREIGN", message="TypeError: not a number"), "internal"),
        ("harmless", Answer(status="UNAVAILABLE", message="full"), "harmless refused"),
        ("internal", Answer(status="OK"), "reachable by callers"),
        ("crowd", Answer(status="NEIGHBOR", message="INTERNAL"), "neighbor harmed"),
    ],
    ids=str,
)
def test_verdicts(target: Target, kind: str, answer: Answer, expected: str | None) -> None:
    of_kind = next(made for made in (case(0, index, [target]) for index in range(500)) if made.kind == kind)
    found = verdict(of_kind, answer, 90.0)
    assert found == expected or (expected and found and expected in found)
