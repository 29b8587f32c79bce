"""The warm-up of a denoiser with an engine that takes too long."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from imprompt_bench.rig import sd15
from imprompt_serving.denoiser import warm_up
from imprompt_serving.denoiser.conditioning import Conditioner
from imprompt_serving.errors import RequestError
from imprompt_serving.specs import CallRows


def test_a_warm_up_that_takes_too_long_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    release, bundle = threading.Event(), sd15(rows=2)
    before = set(threading.enumerate())

    def networks(parts: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        threading.Timer(0.5, release.set).start()
        assert release.wait(10)
        return torch.zeros_like(inputs["sample"])

    monkeypatch.setattr(warm_up, "WAIT_S", 0.1)
    with pytest.raises(RequestError, match=r"did not finish a step within 0\.1 seconds"):
        warm_up.warm_up(bundle, Conditioner(bundle, {}), networks, torch.device("cpu"), CallRows(2))
    assert not {t.name for t in set(threading.enumerate()) - before if not isinstance(t, threading.Timer)}
