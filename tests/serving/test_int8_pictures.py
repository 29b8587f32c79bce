"""A bundle in int8, from export to pictures, which are close to those in fp32, through a running Triton."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from served import Served
from tiny import images
from tiny.oracle import picture_distance

STATUE, OTHER = images.photo(1), images.photo(2)
CAT: dict[str, Any] = {
    "prompt": "a photo of a cat",
    "num_inference_steps": 4,
    "scheduler": "DDIMScheduler",
    "seed": 0,
    "ip_adapter_scale": 0.6,
}


@pytest.fixture
def int8(served: Callable[[str], Served]) -> Served:
    """Serve the bundle `openvino` in int8."""
    return served("int8")


def test_the_quality_report_is_saved_with_the_engines(int8: Served) -> None:
    report = json.loads(Path(int8.bundle.repository, "int8/export.json").read_text())
    assert {row["engine"] for row in report["quality"]} == {"unet", "controlnet_depth"}
    assert all(row["snr_db"] >= row["min_snr_db"] for row in report["quality"])
    assert int8.client.describe("int8")["precision"] == "int8"


def test_pictures_are_close_to_those_in_fp32(int8: Served, served: Callable[[str], Served]) -> None:
    exact = served("openvino").generate(**CAT, ip_adapter_image=STATUE)
    near, other = (int8.generate(**CAT, ip_adapter_image=image) for image in (STATUE, OTHER))

    def distance(one: Any, another: Any) -> float:
        return picture_distance(np.asarray(one.images[0]), np.asarray(another.images[0]))[1]

    assert 0 < distance(near, exact) < 0.5 * distance(near, other)
