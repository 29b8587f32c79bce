"""Bundles in int8 and bf16, from export to pictures, which are close to those in fp32, through a running Triton."""

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
    "control_image": images.control_image("depth"),
}


def test_the_quality_report_is_saved_with_the_engines(served: Callable[[str], Served]) -> None:
    int8 = served("int8")
    report = json.loads(Path(int8.bundle.repository, "int8/export.json").read_text())
    assert {row["engine"] for row in report["quality"]} > {"unet", "controlnet_depth"}
    assert all(row["snr_db"] >= row["min_snr_db"] for row in report["quality"])
    assert int8.client.describe("int8")["precision"] == "int8"


@pytest.mark.parametrize(("precision", "closer"), [("int8", 2), ("bf16", 10)])
def test_pictures_are_close_to_those_in_fp32(served: Callable[[str], Served], precision: str, closer: float) -> None:
    rounded = served(precision)
    exact = served("openvino").generate(**CAT, ip_adapter_image=STATUE)
    near, other = (rounded.generate(**CAT, ip_adapter_image=image) for image in (STATUE, OTHER))

    def distance(one: Any, another: Any) -> float:
        return picture_distance(np.asarray(one.images[0]), np.asarray(another.images[0]))[1]

    assert 0 < distance(near, exact) < distance(near, other) / closer
