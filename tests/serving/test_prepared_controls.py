"""The ControlNets of a job as its steps use them: embedded images, scales, and active steps, without engines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from imprompt_bench.rig import sd15
from imprompt_serving.denoiser.control import PreparedControlNet, is_active, prepare_controls
from imprompt_serving.job_request import ControlOptions
from imprompt_serving.specs import ControlNet, Residual
from jobs import job_request

RESIDUALS = (Residual(2, 0), Residual(2, 0), Residual(2, 0))
BUNDLE = msgspec.structs.replace(
    sd15(rows=2),
    controlnets=(ControlNet(name="depth"), ControlNet(name="shuffle", global_pool=True)),
    residuals=RESIDUALS,
)


class Mean:
    """An embedding of control images: the mean of each, as a single number. Takes two at a time."""

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        images = tensors["control_image"]
        assert len(images) <= 2
        return {"control_embedding": images.mean((1, 2, 3), keepdims=True)}


def prepare(
    *names: str, images: int = 1, pictures: int = 2, branches: int = 2, **changes: Any
) -> list[PreparedControlNet]:
    uses = tuple(ControlOptions(name=name, scale=0.5) for name in names)
    request = job_request(controls=uses, **changes)
    values = torch.arange(1.0, images + 1)[:, None, None, None].expand(-1, 3, 8, 8)
    tensors = {f"control_image_{name}": values for name in names}
    engines = {"depth": Mean(), "shuffle": Mean()}
    return list(prepare_controls(BUNDLE, engines, request, tensors, pictures, branches))


def test_one_image_controls_all_pictures() -> None:
    (net,) = prepare("depth")
    assert net.embedding.flatten().tolist() == [1, 1]
    assert net.embedding.shape == (2, 1, 1, 1, 1)
    assert net.scale.tolist() == [0.5, 0.5, 0.5]
    assert net.first_row == 0


def test_each_prompt_has_its_own_image() -> None:
    (net,) = prepare("depth", images=3, pictures=6, num_images_per_prompt=2)
    assert net.embedding.flatten().tolist() == [1, 1, 2, 2, 3, 3]
    assert net.embedding.shape == (6, 1, 1, 1, 1)


@pytest.mark.parametrize(("images", "expected"), [(1, [1, 1, 1]), (3, [1, 2, 3])])
def test_clips_have_an_image_for_all_frames_or_for_each(images: int, expected: list[float]) -> None:
    (net,) = prepare("depth", images=images, frames=3)
    assert net.embedding.shape == (2, 3, 1, 1, 1)
    assert net.embedding[1].flatten().tolist() == expected


def test_guess_mode_leaves_out_unconditional_rows_and_weakens_early_residuals() -> None:
    (net,) = prepare("depth", guess_mode=True)
    assert net.first_row == 2
    torch.testing.assert_close(net.scale, 0.5 * torch.tensor([0.1, 0.1**0.5, 1.0]))


def test_guess_mode_without_guidance_affects_all_rows() -> None:
    (net,) = prepare("depth", guess_mode=True, branches=1)
    assert net.first_row == 0


def test_pooling_nets_are_always_in_guess_mode_with_equal_scales() -> None:
    (net,) = prepare("shuffle")
    assert net.first_row == 2
    assert net.scale.tolist() == [0.5, 0.5, 0.5]


def test_the_first_net_decides_on_guess_mode() -> None:
    assert [net.first_row for net in prepare("depth", "shuffle")] == [0, 0]
    assert [net.first_row for net in prepare("shuffle", "depth")] == [2, 2]


@pytest.mark.parametrize(
    ("start", "end", "active"),
    [
        (0.0, 1.0, [True, True, True, True]),
        (0.25, 0.75, [False, True, True, False]),
        (0.3, 0.75, [False, False, True, False]),
        (0.0, 0.7, [True, True, False, False]),
    ],
)
def test_active_steps(start: float, end: float, active: list[bool]) -> None:
    assert [is_active(start, end, index, 4) for index in range(4)] == active
