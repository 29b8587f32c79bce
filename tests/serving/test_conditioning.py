"""The UNet inputs of a request, without a server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from imprompt_bench import rig
from imprompt_serving.denoiser.conditioning import Conditioner
from imprompt_serving.denoiser.features import prepare_features, sum_features
from imprompt_serving.job_request import AdapterOptions, ControlOptions, JobRequest
from imprompt_serving.specs import Residual, Shapes, T2IAdapter
from jobs import job_request

BUNDLE = msgspec.structs.replace(rig.sd15(rows=2, adapters=("plain",)), shapes=Shapes(image_tokens=(4, 16), regions=2))


class Projection:
    """An image projection that counts the pictures of each call."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.calls.append(len(tensors["image_embeds"]))
        return {"tokens": np.zeros((self.calls[-1], rig.TOKENS, rig.WIDTH), np.float32)}


def request(prompts: int = 1, controls: tuple[ControlOptions, ...] = ()) -> JobRequest:
    return job_request(seeds=(0,) * prompts, adapters=(AdapterOptions(name="plain"),), controls=controls)


def tensors(pictures: int, *, masked: bool) -> dict[str, torch.Tensor]:
    made = {"ip_adapter_masks_plain": torch.ones(pictures, 64, 64)} if masked else {}
    for prefix in ("", "negative_"):
        made[f"{prefix}prompt_embeds"] = torch.zeros(1, 77, rig.WIDTH)
        made[f"{prefix}image_embeds_plain"] = torch.zeros(pictures, rig.CLIP_WIDTH)
    return made


@pytest.mark.parametrize(("pictures", "masked"), [(4, False), (2, True)])
def test_unused_images_are_not_projected(pictures: int, masked: bool) -> None:
    projection = Projection()
    made = Conditioner(BUNDLE, {"plain": projection})(request(), tensors(pictures, masked=masked))
    assert projection.calls == [pictures, pictures]
    assert made.regions == masked


class Sketch:
    """A T2I-Adapter whose features are the pictures themselves. Takes two at a time."""

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        images = tensors["control_image"]
        assert len(images) <= 2
        return {"intrablock_residual_0": images[:, :, ::8, ::8]}


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_control_images_of_many_prompts_take_several_calls(precision: str, dtype: torch.dtype) -> None:
    """Features have the type of the UNet, and so do the zeros of steps without them."""
    bundle = msgspec.structs.replace(
        rig.sd15(rows=2),
        t2i_adapters=(T2IAdapter(name="sketch", channels=1, downscale_factor=8),),
        features=(Residual(1, 0),),
        precision=precision,
    )
    images = torch.arange(5.0)[:, None, None, None].expand(5, 1, 64, 64).contiguous()
    asked = request(prompts=5, controls=(ControlOptions(name="sketch", scale=2.0),))
    (found,) = prepare_features(
        bundle, {"sketch": Sketch()}, asked, {"control_image_sketch": images}, pictures=5, branches=2
    )
    rows = found.tensors["intrablock_residual_0"]
    assert rows.shape == (10, 1, 8, 8)
    assert rows[:, 0, 0, 0].tolist() == [0, 2, 4, 6, 8] * 2
    assert rows.dtype == dtype
    assert sum_features(bundle, [], 10, (8, 8), torch.device("cpu"))["intrablock_residual_0"].dtype == dtype


def test_pictures_of_several_prompts_share_one_control_image() -> None:
    bundle = msgspec.structs.replace(
        rig.sd15(rows=2),
        t2i_adapters=(T2IAdapter(name="sketch", channels=1, downscale_factor=8),),
        features=(Residual(1, 0),),
    )
    asked, image = request(prompts=3, controls=(ControlOptions(name="sketch"),)), torch.full((1, 1, 64, 64), 4.0)
    (found,) = prepare_features(
        bundle, {"sketch": Sketch()}, asked, {"control_image_sketch": image}, pictures=3, branches=2
    )
    assert found.tensors["intrablock_residual_0"][:, 0, 0, 0].tolist() == [4.0] * 6


def test_control_images_of_t2i_adapters_reach_the_unet_during_their_steps() -> None:
    bundle = msgspec.structs.replace(
        rig.sd15(rows=2),
        t2i_adapters=(T2IAdapter(name="sketch", channels=1, downscale_factor=8),),
        features=(Residual(1, 0),),
    )
    asked = job_request(controls=(ControlOptions(name="sketch", scale=2.0, end=0.5),))
    given = TEXT | {"control_image_sketch": torch.full((1, 1, 64, 64), 3.0)}
    made = Conditioner(bundle, {}, t2i_adapters={"sketch": Sketch()})(asked, given)
    found = [made.at(step, 4)["intrablock_residual_0"] for step in (0, 3)]
    assert [tensor.unique().tolist() for tensor in found] == [[6.0], [0.0]]


TEXT = {f"{prefix}prompt_embeds": torch.zeros(1, 77, rig.WIDTH) for prefix in ("", "negative_")}


@pytest.mark.parametrize("size", [256, 7])
def test_guidance_is_embedded_as_in_diffusers(size: int) -> None:
    bundle = msgspec.structs.replace(rig.sd15(rows=2), time_cond_proj_dim=size)
    asked = job_request(guidance_scale=8.5, num_images_per_prompt=2)
    found = Conditioner(bundle, {})(asked, TEXT).at(0, 4)["timestep_cond"]
    embed: Any = StableDiffusionPipeline.get_guidance_scale_embedding
    expected = embed(None, w=torch.tensor([7.5]), embedding_dim=size)
    torch.testing.assert_close(found, expected.expand(2, size))


def test_guidance_is_not_embedded_for_clips() -> None:
    """Clips run an unconditional branch, and the UNet gets zeros."""
    bundle = msgspec.structs.replace(rig.sd15(rows=2), time_cond_proj_dim=8)
    found = Conditioner(bundle, {})(job_request(guidance_scale=8.5, frames=4), TEXT).at(0, 4)["timestep_cond"]
    assert torch.equal(found, torch.zeros(2, 8))


def test_rows_of_negative_prompts_come_first() -> None:
    given = {
        "prompt_embeds": torch.tensor([1.0, 2.0])[:, None, None].expand(2, 77, 768),
        "negative_prompt_embeds": torch.tensor([3.0, 4.0])[:, None, None].expand(2, 77, 768),
    }
    for guidance_scale, rows in ((7.5, [3, 3, 4, 4, 1, 1, 2, 2]), (1.0, [1, 1, 2, 2])):
        asked = job_request(num_images_per_prompt=2, guidance_scale=guidance_scale)
        made = Conditioner(rig.sd15(rows=8), {})(asked, given)
        assert made.pictures == 4
        assert made.at(0, 4)["encoder_hidden_states"][:, 0, 0].tolist() == rows


class Ones:
    """An image projection that returns tokens of ones."""

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"tokens": np.ones((len(tensors["image_embeds"]), rig.TOKENS, rig.WIDTH), np.float32)}


@pytest.mark.parametrize(("start", "end"), [(0.25, 1.0), (0.0, 0.75), (0.25, 0.75), (0.0, 1.0)])
def test_an_adapter_has_no_effect_outside_of_its_steps(start: float, end: float) -> None:
    use = AdapterOptions(name="plain", scale=0.5, start=start, end=end)
    made = Conditioner(BUNDLE, {"plain": Ones()})(job_request(adapters=(use,)), tensors(1, masked=False))
    scales = [float(made.at(index, 4)["ip_scale_plain"].unique()) for index in range(4)]
    assert scales == [0.5 if start <= index / 4 and (index + 1) / 4 <= end else 0.0 for index in range(4)]
    assert made.at(1, 4) is made.at(2, 4), "the same object while nothing changes"
    assert not made.regions


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("task", ["text-to-image", "image-to-image", "inpainting"])
def test_sdxl_gets_the_sizes_that_diffusers_passes(task: str, guided: bool) -> None:
    """Compared with the values that diffusers' pipelines pass for the same task."""
    bundle = msgspec.structs.replace(rig.sd15(rows=8), family="sdxl", pooled_size=4)
    given = TEXT | {f"{prefix}pooled_prompt_embeds": torch.zeros(1, 4) for prefix in ("", "negative_")}

    def told(**settings: Any) -> list[list[float]]:
        asked = job_request(task, guidance_scale=7.5 if guided else 1.0, num_images_per_prompt=2, **settings)
        return Conditioner(bundle, {})(asked, given).at(0, 4)["time_ids"].tolist()

    def rows(negative: list[float], positive: list[float]) -> list[list[float]]:
        if not guided:
            return [positive] * 2
        return [negative, positive] * 2 if task == "text-to-image" else [negative] * 2 + [positive] * 2

    own = [64.0, 64.0, 0.0, 0.0, 64.0, 64.0]
    assert told() == rows(own, own)
    sizes: dict[str, Any] = {"original_size": (10, 11), "target_size": (12, 13), "crops_coords_top_left": (1, 2)}
    positive = [10.0, 11.0, 1.0, 2.0, 12.0, 13.0]
    assert told(**sizes) == rows(positive, positive)
    sizes |= {"negative_original_size": (20, 21), "negative_crops_coords_top_left": (3, 4)}
    from_text = task == "text-to-image"
    assert told(**sizes) == rows(positive if from_text else [20.0, 21.0, 1.0, 2.0, 12.0, 13.0], positive)
    sizes["negative_target_size"] = (22, 23)
    crop = [3.0, 4.0] if from_text else [1.0, 2.0]
    assert told(**sizes) == rows([20.0, 21.0, *crop, 22.0, 23.0], positive)
    sizes["negative_original_size"] = None
    assert told(**sizes) == rows(positive if from_text else [10.0, 11.0, 1.0, 2.0, 22.0, 23.0], positive)


class Numbered:
    """An image projection whose tokens are the embeddings of their picture: one number each."""

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        values = tensors["image_embeds"][:, :1, None]
        return {"tokens": np.broadcast_to(values, (len(values), rig.TOKENS, rig.WIDTH)).copy()}


def numbered(**changes: Any) -> Any:
    """Return the UNet inputs for two prompts and six pictures, numbered from 0, and from 10 in the negative branch."""
    given: dict[str, torch.Tensor] = {}
    for prefix, first in (("", 0), ("negative_", 10)):
        given[f"{prefix}prompt_embeds"] = torch.zeros(2, 77, rig.WIDTH)
        numbers = torch.arange(first, first + 6).float()
        given[f"{prefix}image_embeds_plain"] = numbers[:, None].expand(6, rig.CLIP_WIDTH)
    masks = changes.pop("masks", None)
    if masks is not None:
        given["ip_adapter_masks_plain"] = masks
    frames, results = changes.pop("frames", None), changes.pop("num_images_per_prompt", 1)
    use = AdapterOptions(name="plain", **changes)
    asked = job_request(seeds=(0,), adapters=(use,), frames=frames, num_images_per_prompt=results)
    bundle = msgspec.structs.replace(BUNDLE, shapes=Shapes(image_tokens=(4, 24), regions=6))
    return Conditioner(bundle, {"plain": Numbered()})(asked, given).at(0, 4)


def test_each_prompt_has_its_share_of_the_pictures() -> None:
    tokens = numbered(per="prompt", num_images_per_prompt=2)["ip_tokens_plain"]
    assert tokens.shape == (8, 1, 3 * rig.TOKENS, rig.WIDTH)
    firsts = tokens[:, 0, :: rig.TOKENS, 0].tolist()
    assert firsts == [[10, 11, 12]] * 2 + [[13, 14, 15]] * 2 + [[0, 1, 2]] * 2 + [[3, 4, 5]] * 2


def test_frames_between_keyframes_have_interpolated_tokens() -> None:
    made = numbered(per="frame", keyframes=(0, 1, 5), frames=8)
    tokens = made["ip_tokens_plain"]
    assert tokens.shape == (4, 8, 1, 2 * rig.TOKENS, rig.WIDTH)
    assert tokens[2, :, 0, 0, 0].tolist() == [0, 2, 2.5, 3, 3.5, 4, 4, 4]
    assert tokens[3, :, 0, -1, 0].tolist() == [1, 3, 3.5, 4, 4.5, 5, 5, 5]
    assert tokens[0, :, 0, 0, 0].tolist() == [10, 12, 12.5, 13, 13.5, 14, 14, 14]
    assert made["ip_mask_plain_0"].shape == (4, 1, 1, 64)


@pytest.mark.parametrize(("frames", "sets"), [(None, 1), (None, 2), (4, 1), (4, 4)])
def test_each_prompt_or_frame_has_its_masks(frames: int | None, sets: int) -> None:
    """Mask k of a set is white in row k; the sets differ in the columns."""
    masks = torch.zeros(6 * sets, 64, 64, dtype=torch.bool)
    for index in range(6 * sets):
        masks[index, 8 * (index % 6) : 8 * (index % 6) + 8, 16 * (index // 6) :] = True
    made = numbered(masks=masks, frames=frames)
    found = made["ip_mask_plain_0"].unflatten(-1, (8, 8)) > 0.5
    expected = masks[:, ::8, ::8].unflatten(0, (sets, 6))
    if frames is None:
        assert torch.equal(found, expected.expand(2, 6, 8, 8).repeat(2, 1, 1, 1))
    else:
        assert torch.equal(found, expected.expand(4, sets, 6, 8, 8))
    assert made["ip_scale_plain"].shape[:2] == (4, 6)
    assert made["ip_bias_plain"].shape == (4, 6, rig.TOKENS)


def test_many_pictures_are_projected_in_several_calls() -> None:
    projection = Projection()
    pictures = 2 * BUNDLE.max_images + 1
    use = AdapterOptions(name="plain", per="frame", keyframes=tuple(range(pictures)))
    asked = job_request(adapters=(use,), frames=pictures)
    Conditioner(BUNDLE, {"plain": projection})(asked, tensors(pictures, masked=False))
    assert projection.calls == [BUNDLE.max_images, BUNDLE.max_images, 1] * 2
