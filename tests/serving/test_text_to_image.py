"""Text-to-image with an image prompt: the pictures of diffusers, through a running Triton."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import Served
from parity import assert_different, assert_same
from tiny import images, oracle

STATUE, OTHER = images.photo(1), images.photo(2, size=(120, 80))


def both(sd15: Served, scale: float = 0.6, image: Any = STATUE, scheduler: str = "DDIMScheduler", **arguments: Any):  # type: ignore[no-untyped-def]
    """The server's result and the oracle's pictures for the plain adapter."""
    pipe = oracle.pipeline(sd15.bundle.checkpoints / "base", sd15.bundle.adapters[:1], scheduler=scheduler)
    pipe.set_ip_adapter_scale(scale)
    arguments = {"prompt": "a photo of a cat", "num_inference_steps": 4, "height": 64, "width": 64} | arguments
    expected = oracle.generate(pipe, ip_adapter_image=[image] if isinstance(image, list) else image, **arguments)
    arguments["seed"] = arguments.get("seed", 0)
    result = sd15.generate(
        ip_adapter_image={"plain": image}, ip_adapter_scale=scale, scheduler=scheduler, **arguments
    )
    return result, expected


@pytest.mark.parametrize(
    "scheduler",
    [
        "DDIMScheduler",
        "DDPMScheduler",
        "PNDMScheduler",
        "LMSDiscreteScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "UniPCMultistepScheduler",
        "DEISMultistepScheduler",
        "LCMScheduler",
        "TCDScheduler",
    ],
)
def test_same_picture_with_each_scheduler(sd15: Served, scheduler: str) -> None:
    assert_same(*both(sd15, scheduler=scheduler))
