"""A bundle for OpenVINO, through a running Triton, compared with diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
from diffusers import ControlNetModel

from parity import assert_different, assert_same
from served import Served
from tiny import images, oracle

STATUE, OTHER, DEPTH = images.photo(1), images.photo(2, size=(120, 80)), images.control_image("depth")
CAT: dict[str, Any] = {"prompt": "a photo of a cat", "num_inference_steps": 4, "height": 64, "width": 64}


@pytest.fixture
def openvino(served: Callable[[str], Served]) -> Served:
    return served("openvino")


def test_same_picture(openvino: Served) -> None:
    pipe = openvino.bundle.oracle(scheduler="DDIMScheduler")
    pipe.set_ip_adapter_scale(0.6)
    for size in ({}, {"height": 72, "width": 104}):  # one that is not a multiple of 64
        arguments = CAT | size
        expected = oracle.generate(pipe, ip_adapter_image=STATUE, **arguments)
        arguments |= {"scheduler": "DDIMScheduler", "ip_adapter_scale": 0.6, "seed": 0}
        result = openvino.generate(**arguments, ip_adapter_image=STATUE)
        assert_same(result, expected)
        assert_different(result, openvino.generate(**arguments, ip_adapter_image=OTHER))


def test_same_picture_with_a_start_picture_and_a_controlnet(openvino: Served) -> None:
    pipe = openvino.bundle.oracle(
        diffusers.StableDiffusionControlNetImg2ImgPipeline,
        scheduler="DDIMScheduler",
        controlnet=ControlNetModel.from_pretrained(openvino.bundle.checkpoints / "depth"),
    )
    pipe.set_ip_adapter_scale(0.6)
    arguments = {"prompt": "a photo of a cat", "num_inference_steps": 6, "image": OTHER.resize((64, 64))}
    expected = oracle.generate(pipe, ip_adapter_image=STATUE, control_image=DEPTH, **arguments)
    arguments |= {"scheduler": "DDIMScheduler", "ip_adapter_scale": 0.6, "seed": 0, "ip_adapter_image": STATUE}
    result = openvino.generate(**arguments, control_image=DEPTH)
    assert_same(result, expected)
    assert_different(result, openvino.generate(**arguments))
