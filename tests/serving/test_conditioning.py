"""What a request becomes for the UNet, without a server."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np
import pytest
import torch

from imprompt_bench import rig
from imprompt_serving.denoiser.conditioning import Conditioner
from imprompt_serving.denoiser.features import prepare_features
from imprompt_serving.job import AdapterUse, ControlUse, JobRequest
from imprompt_serving.specs import Residual, Shapes, T2IAdapter
from jobs import job_request

BUNDLE = msgspec.structs.replace(rig.sd15(rows=2, adapters=("plain",)), shapes=Shapes(image_tokens=(4, 16), regions=2))


class Projection:
    """Counts the pictures of each call."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.calls.append(len(tensors["image_embeds"]))
        return {"tokens": np.zeros((self.calls[-1], rig.TOKENS, rig.WIDTH), np.float32)}


def request(prompts: int = 1, controls: tuple[ControlUse, ...] = ()) -> JobRequest:
    return job_request(seeds=(0,) * prompts, adapters=(AdapterUse(name="plain"),), controls=controls)


def tensors(pictures: int, *, masked: bool) -> dict[str, torch.Tensor]:
    made = {"ip_adapter_masks_plain": torch.ones(pictures, 64, 64)} if masked else {}
    for prefix in ("", "negative_"):
        made[f"{prefix}prompt_embeds"] = torch.zeros(1, 77, rig.WIDTH)
        made[f"{prefix}image_embeds_plain"] = torch.zeros(pictures, rig.CLIP_WIDTH)
    return made


@pytest.mark.parametrize(("pictures", "masked"), [(4, False), (2, True)])
def test_as_many_as_are_served(pictures: int, masked: bool) -> None:
    projection = Projection()
    made = Conditioner(BUNDLE, {"plain": projection})(request(), tensors(pictures, masked=masked))
    assert projection.calls == [pictures, pictures]
    assert made.regions == masked


class Sketch:
    """A T2I-Adapter whose features are the pictures themselves; takes two at a time."""

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        images = tensors["control_image"]
        assert len(images) <= 2
        return {"intrablock_residual_0": images[:, :, ::8, ::8]}


def test_control_images_of_many_prompts_take_several_calls() -> None:
    bundle = msgspec.structs.replace(
        rig.sd15(rows=2),
        t2i_adapters=(T2IAdapter(name="sketch", channels=1, downscale_factor=8),),
        features=(Residual(1, 0),),
    )
    images = torch.arange(5.0)[:, None, None, None].expand(5, 1, 64, 64).contiguous()
    asked = request(prompts=5, controls=(ControlUse(name="sketch", scale=2.0),))
    (found,) = prepare_features(
        bundle, {"sketch": Sketch()}, asked, {"control_image_sketch": images}, pictures=5, branches=2
    )
    rows = found.tensors["intrablock_residual_0"]
    assert rows.shape == (10, 1, 8, 8)
    assert rows[:, 0, 0, 0].tolist() == [0, 2, 4, 6, 8] * 2
