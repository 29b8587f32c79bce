"""The watchdog, with a real Triton and a model that hangs, computes, or fails on demand."""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from imprompt_serving.heartbeat import Heart, read_pulses
from imprompt_serving.launcher import LaunchError, Server, activity, canary, watchdog
from imprompt_serving.launcher.health import Health
from imprompt_serving.launcher.watchdog import Watchdog

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("pytriton") is None and shutil.which("tritonserver") is None,
    reason="needs a Triton (the extra [server])",
)

CONFIG = """
backend: "python"
input [{ name: "prompt" data_type: TYPE_STRING dims: [-1] }]
output [{ name: "images" data_type: TYPE_UINT8 dims: [-1, -1, -1, 3] }]
instance_group [{ kind: KIND_CPU }]
parameters [{ key: "capabilities" value: { string_value: "{}" } }]
"""

# Does what the file says that the environment names, in place of a picture.
MODEL = """
import os, time
from contextlib import ExitStack
from pathlib import Path
import numpy as np
import triton_python_backend_utils as pb_utils
from imprompt_serving.heartbeat import Heart

file = Path(os.environ["TOY_MODE"])

class TritonPythonModel:
    def initialize(self, args):
        self.heart = Heart(args["model_instance_name"])
        self.heart.loaded()
        self.stuck = ExitStack()

    def execute(self, requests):
        return [self.answer() for request in requests]

    def answer(self):
        mode = file.read_text()
        while mode == "hang" and file.read_text() == mode:
            time.sleep(0.05)
        while mode == "compute" and file.read_text() == mode:
            pass
        if mode == "send":
            self.stuck.enter_context(self.heart.sending.one())
        if mode == "call":
            self.stuck.enter_context(self.heart.call("toy"))
        if mode == "good":
            self.stuck.close()
        if mode in ("INTERNAL", "INVALID_ARG"):
            error = pb_utils.TritonError("a reason", getattr(pb_utils.TritonError, mode))
            return pb_utils.InferenceResponse(error=error)
        self.heart.sent_picture()
        return pb_utils.InferenceResponse([pb_utils.Tensor("images", np.zeros((1, 8, 8, 3), np.uint8))])
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A server with one model, and the file that says what it does."""
    folder = tmp_path_factory.mktemp("watchdog")
    version = folder / "repository" / "toy" / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(MODEL)
    (version.parent / "config.pbtxt").write_text(CONFIG)
    mode = folder / "mode"
    mode.write_text("good")
    os.environ["TOY_MODE"] = str(mode)
    with Server(folder / "repository") as server:
        yield server, mode
    del os.environ["TOY_MODE"]


@pytest.fixture
def watched(toy: tuple[Server, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Watchdog, Path]]:
    """A watchdog with little patience that has seen a picture."""
    monkeypatch.setattr(watchdog, "PATIENCE_S", 2.0)
    monkeypatch.setattr(watchdog, "INTERVAL_S", 0.2)
    monkeypatch.setattr(canary, "INTERVAL_S", 0.4)
    monkeypatch.setattr(activity, "WINDOW_S", 1.0)
    server, mode = toy
    mode.write_text("good")
    with closing(Watchdog(server, max_canary_age=30.0)) as watching:
        wait_for(watching.has_seen_pictures)
        # What an earlier test left stuck must be gone.
        wait_for(lambda: not any(one.sending or one.calls for one in server.pulses().values()))
        yield watching, mode
        mode.write_text("good")


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "did not happen in time"
        time.sleep(0.05)


def check_until(watching: Watchdog, condition: Callable[[], bool], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "did not happen in time"
        watching.check()
        time.sleep(0.05)


def waits_longer_than(watching: Watchdog, seconds: float) -> Callable[[], bool]:
    """Return a condition: a canary has been waiting for this long."""

    def condition() -> bool:
        since = watching.canaries[0].waiting_since
        return since is not None and time.monotonic() - since > seconds

    return condition


def test_model_that_hangs_is_noticed(watched: tuple[Watchdog, Path]) -> None:
    watching, mode = watched
    mode.write_text("hang")
    with pytest.raises(LaunchError, match=r"toy has not made a picture for \d+ s; held up by tritonserver"):
        check_until(watching, lambda: False)


def test_model_that_computes_is_busy_and_not_hung(
    watched: tuple[Watchdog, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    watching, mode = watched
    mode.write_text("compute")
    # The toy does not say that it holds the canary. Let it be the suspect in place of Triton.
    monkeypatch.setattr(watching, "_holders", lambda *_: ["toy_0_0"])
    check_until(watching, waits_longer_than(watching, 3 * watchdog.PATIENCE_S))
    monkeypatch.setattr(watchdog, "BUSY_PATIENCE_S", 1.0)
    with pytest.raises(LaunchError, match="held up by toy_0_0"):
        check_until(watching, lambda: False)


def test_model_that_fails_is_noticed_with_its_error(watched: tuple[Watchdog, Path]) -> None:
    watching, mode = watched
    mode.write_text("INTERNAL")
    with pytest.raises(LaunchError, match="toy has failed to make a picture for 2 s: a reason"):
        check_until(watching, lambda: False)


def test_model_that_refuses_canaries_is_only_watched_by_its_process(watched: tuple[Watchdog, Path]) -> None:
    watching, mode = watched
    mode.write_text("INVALID_ARG")
    check_until(watching, lambda: watching.canaries[0].refused)
    failing = watching.canaries[0].failing_since
    assert failing is not None
    check_until(watching, lambda: time.monotonic() - failing > 2 * watchdog.PATIENCE_S)


@pytest.mark.parametrize(
    ("mode", "complaint"),
    [("send", "toy_0_0 has been sending a response for"), ("call", "toy_0_0 has been waiting for toy for")],
)
def test_stuck_send_or_call_is_noticed_while_pictures_come(
    watched: tuple[Watchdog, Path], mode: str, complaint: str
) -> None:
    watching, file = watched
    file.write_text(mode)
    with pytest.raises(LaunchError, match=complaint):
        check_until(watching, lambda: False)


def test_no_verdict_after_the_machine_was_suspended(watched: tuple[Watchdog, Path]) -> None:
    watching, mode = watched
    mode.write_text("hang")
    until = time.monotonic() + 60
    while not waits_longer_than(watching, 2 * watchdog.PATIENCE_S)():  # as if this process did not run
        assert time.monotonic() < until
        time.sleep(0.05)
    watching.check()
    with pytest.raises(LaunchError, match="has not made a picture"):
        check_until(watching, lambda: False)


def test_health_says_what_the_canary_saw(watched: tuple[Watchdog, Path]) -> None:
    watching, mode = watched
    health = Health(max_canary_age=1.0, canaries=watching.canaries)
    assert health.answer("/readyz")[0] == 503  # not serving yet
    health.state = "serving"
    check_until(watching, lambda: health.answer("/readyz")[0] == 200)
    assert health.answer("/readyz/toy")[1]["canary_age_seconds"] <= 1.0
    assert health.answer("/readyz/other")[0] == 404
    mode.write_text("hang")
    check_until(watching, lambda: health.answer("/readyz/toy")[0] == 503, watchdog.PATIENCE_S)
    assert health.answer("/livez")[0] == 200


def test_heartbeat_tells_of_the_oldest_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPROMPT_HEARTBEATS", str(tmp_path))
    heart = Heart("model_0_0")
    assert not read_pulses(tmp_path)["model_0_0"].loaded
    heart.loaded()
    first = heart.sending.begin()
    heart.sending.begin()
    with heart.call("encoder"):
        until = time.monotonic() + 10
        while "encoder" not in (pulse.calls if (pulse := read_pulses(tmp_path).get("model_0_0")) else {}):
            assert time.monotonic() < until
            time.sleep(0.05)
        before = pulse.sending
        heart.sending.end(first)
        while pulse.sending == before:
            assert time.monotonic() < until
            pulse = read_pulses(tmp_path).get("model_0_0", pulse)
        assert before is not None
        assert pulse.sending is not None
        assert pulse.sending > before
    heart.close()
