"""A job whose numbers overflow ends with an error that names the cause, and takes no other job along."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from imprompt_bench.rig import Rig, sd15
from imprompt_serving.denoiser.job import suspect
from imprompt_serving.errors import InvalidRequest, RequestError
from imprompt_serving.job import AdapterUse, ControlUse
from jobs import job_request


class Half:
    """A UNet that predicts half of its input as noise; of rows with large values it makes infinite ones."""

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        noise = tensors["sample"] * np.float32(0.5)
        large = np.abs(tensors["sample"]).max(axis=(1, 2, 3)) > 1e3
        noise[large] = np.inf
        return {"noise_pred": noise}


def test_a_job_that_overflows_names_the_cause_and_spares_the_others() -> None:
    rig = Rig(sd15(rows=4), Half())
    expected = rig.submit(rig.job("alone", steps=3, size=64, seed=5))()
    bad = rig.job("bad", steps=3, size=64, scheduler="DDPMScheduler")
    bad.latents *= 1e4
    waits = [rig.submit(job) for job in (bad, rig.job("good", steps=3, size=64, seed=5))]
    with pytest.raises(InvalidRequest, match="scheduler: the latents became infinite"):
        waits[0]()
    assert torch.allclose(waits[1](), expected, atol=1e-5)
    own = rig.job("own", steps=3, size=64)
    own.latents *= 1e4
    with pytest.raises(RequestError) as caught:
        rig.submit(own)()
    assert caught.value.status == "INTERNAL"
    rig.denoiser.stop()


@pytest.mark.parametrize(
    ("parameter", "changes", "embedding"),
    [
        (None, {}, 1.0),
        ("scheduler", {"scheduler": "DDPMScheduler"}, 1.0),
        ("scheduler_config", {"scheduler_config": {"variance_type": "fixed_large_log"}, "guidance_scale": 1e4}, 1.0),
        ("guidance_scale", {"guidance_scale": -1e4, "scheduler": "DDPMScheduler"}, 1.0),
        ("ip_adapter_scale", {"adapters": (AdapterUse(name="plain", scale=1e4),)}, 1.0),
        ("ip_adapter_scale", {"adapters": (AdapterUse(name="plain", scale={"up": {"block_0": [0, -1e4]}}),)}, 1.0),
        ("controlnet_conditioning_scale", {"controls": (ControlUse(name="depth", scale=-1e4),)}, 1.0),
        ("lora", {"lora": {"soft": -8.0}}, 1.0),
        (None, {"lora": {"soft": 1.0}}, 1.0),
        ("ip_adapter_image_embeds", {"adapters": (AdapterUse(name="plain"),)}, 9e3),
    ],
)
def test_what_is_suspected(parameter: str | None, changes: dict[str, Any], embedding: float) -> None:
    tensors = {"image_embeds_plain": torch.full((1, 4), embedding), "prompt_embeds": torch.zeros(1, 4)}
    assert suspect(job_request(**changes), tensors) == parameter
