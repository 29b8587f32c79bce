"""A short round of what `make fuzz` does at length. The cases are always the same, and no verdict hangs on time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from fuzz import soak
from fuzz.cases import KINDS, case
from fuzz.processes import growth
from fuzz.runner import Attacked, run
from fuzz.target import Target, read_targets
from fuzz.transports import Answer
from fuzz.verdicts import verdict
from served import Served

CASES = 300
MOST_GROWTH_MB = 64.0


@pytest.fixture(scope="module")
def attacked(served: Callable[[str], Served]) -> Iterator[Attacked]:
    """The bundle with most features: ControlNets, a T2I-Adapter, clips and an image prompt."""
    control = served("control")
    targets = read_targets(control.bundle.repository)
    with Attacked(control.server, targets) as attacked:
        attacked.warm_up()
        yield attacked


def test_nothing_that_callers_send_harms_the_server(attacked: Attacked) -> None:
    report = run(attacked, (case(0, index, attacked.targets) for index in range(CASES)))
    assert not report.failures, "\n" + report.causes()
    assert report.cases == CASES
    assert {kind for kind, _ in report.answers} == KINDS.keys() - {"http"}


def test_refusals_on_streams_and_callers_who_leave_leave_nothing_behind(attacked: Attacked) -> None:
    refused = soak.refusals(attacked, 100)
    assert not refused.failures
    assert refused.statuses == {"InvalidRequest": 100}
    assert growth(refused.before, refused.after) < MOST_GROWTH_MB
    left = soak.cancels(attacked, 30, before=refused.after)
    assert not left.failures
    assert left.statuses["LEFT"] > 10
    assert growth(left.before, left.after) < MOST_GROWTH_MB


@pytest.fixture(scope="module")
def target(bundle: Callable[[str], object]) -> Target:
    return read_targets(bundle("control").repository)[0]  # type: ignore[attr-defined]


def test_a_case_is_the_same_whenever_it_is_made(target: Target) -> None:
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
        ("internal", Answer(status="OK"), "open to strangers"),
        ("crowd", Answer(status="NEIGHBOR", message="INTERNAL"), "neighbor harmed"),
    ],
    ids=str,
)
def test_verdicts(target: Target, kind: str, answer: Answer, expected: str | None) -> None:
    of_kind = next(made for made in (case(0, index, [target]) for index in range(500)) if made.kind == kind)
    found = verdict(of_kind, answer, 90.0)
    assert found == expected or (expected and found and expected in found)
