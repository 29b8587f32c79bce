"""Adapters, scales, masks, and embeddings on a running Triton: the same pictures as diffusers."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import IPAdapterMaskProcessor

from imprompt import InvalidRequest
from parity import assert_different, assert_same
from served import Served
from tiny import images, oracle

PHOTOS = images.photos(10, seed=20)
STATUE, OTHER = PHOTOS[:2]
SMALL: dict[str, Any] = {"prompt": "a photo of a cat", "num_inference_steps": 4, "height": 64, "width": 64}
INSTANT_STYLE = {"down": {"block_2": [1.0]}, "up": {"block_1": [0.0, 0.9]}}


@pytest.fixture(scope="module")
def pipe(served: Any) -> Any:
    """A diffusers pipeline with the named adapters, in that order."""
    made = served("sd15").bundle
    by_name = dict(zip(("plain", "plus", "full_face"), made.adapters, strict=True))

    @cache
    def load(*names: str) -> Any:
        return oracle.pipeline(made.checkpoints / "base", [by_name[name] for name in names])

    return load


@pytest.mark.parametrize("adapter", ["plain", "plus", "full_face"])
@pytest.mark.parametrize("count", [1, 2])
def test_each_kind_of_adapter(sd15: Served, pipe: Any, adapter: str, count: int) -> None:
    loaded = pipe(adapter)
    loaded.set_ip_adapter_scale(0.6)
    expected = oracle.generate(loaded, ip_adapter_image=[PHOTOS[:count]], **SMALL)
    arguments = {**SMALL, "ip_adapter_scale": 0.6, "seed": 0}
    result = sd15.generate(**arguments, ip_adapter_image={adapter: PHOTOS[:count]})
    assert_same(result, expected)
    assert_different(result, sd15.generate(**arguments, ip_adapter_image={adapter: PHOTOS[2 : 2 + count]}))


def test_ten_style_images_and_a_face(sd15: Served, pipe: Any) -> None:
    loaded = pipe("plus", "full_face")
    loaded.set_ip_adapter_scale([0.7, 0.3])
    expected = oracle.generate(loaded, ip_adapter_image=[PHOTOS, images.photo(3)], **SMALL)
    arguments = {**SMALL, "ip_adapter_image": {"plus": PHOTOS, "full_face": images.photo(3)}, "seed": 0}
    result = sd15.generate(**arguments, ip_adapter_scale=[0.7, 0.3])
    assert_same(result, expected)
    assert_different(result, sd15.generate(**arguments, ip_adapter_scale=[0.3, 0.7]))


def test_all_adapters_as_a_list(sd15: Served, pipe: Any) -> None:
    loaded = pipe("plain", "plus", "full_face")
    loaded.set_ip_adapter_scale([0.5, 0.4, 0.3])
    expected = oracle.generate(loaded, ip_adapter_image=[STATUE, [OTHER, STATUE], OTHER], **SMALL)
    result = sd15.generate(
        **SMALL, ip_adapter_image=[STATUE, [OTHER, STATUE], OTHER], ip_adapter_scale=[0.5, 0.4, 0.3], seed=0
    )
    assert_same(result, expected)


@pytest.mark.parametrize(
    "scale",
    [
        pytest.param({"up": {"block_1": [0.0, 1.0]}}, id="style"),
        pytest.param(INSTANT_STYLE, id="style and layout"),
        pytest.param({"mid": 0.7, "down": 0.4}, id="whole parts"),
    ],
)
def test_scales_by_block(sd15: Served, pipe: Any, scale: dict[str, Any]) -> None:
    loaded = pipe("plain")
    loaded.set_ip_adapter_scale(scale)
    arguments = {**SMALL, "ip_adapter_image": {"plain": STATUE}, "seed": 0}
    result = sd15.generate(**arguments, ip_adapter_scale=scale)
    assert_same(result, oracle.generate(loaded, ip_adapter_image=STATUE, **SMALL))
    assert_different(result, sd15.generate(**arguments, ip_adapter_scale=1.0))


def test_scales_by_block_of_two_adapters(sd15: Served, pipe: Any) -> None:
    scales = [{"down": {"block_2": [1.0]}}, {"up": {"block_1": [0.0, 1.0]}}]
    loaded = pipe("plain", "plus")
    loaded.set_ip_adapter_scale(scales)
    result = sd15.generate(**SMALL, ip_adapter_image={"plain": STATUE, "plus": OTHER}, ip_adapter_scale=scales, seed=0)
    assert_same(result, oracle.generate(loaded, ip_adapter_image=[STATUE, OTHER], **SMALL))


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (72, 104)], ids=str)
@pytest.mark.parametrize("adapter", ["plain", "full_face"])
def test_regional_masks(sd15: Served, pipe: Any, adapter: str, size: tuple[int, int]) -> None:
    height, width = size
    masks = [images.mask(side, size=(width, height)) for side in ("left", "right")]
    loaded = pipe(adapter)
    loaded.set_ip_adapter_scale([[0.7, 0.5]])
    prepared = IPAdapterMaskProcessor().preprocess(masks, height=height, width=width)
    arguments = {**SMALL, "height": height, "width": width}
    expected = oracle.generate(
        loaded,
        ip_adapter_image=[[STATUE, OTHER]],
        cross_attention_kwargs={"ip_adapter_masks": [prepared.reshape(1, 2, height, width)]},
        **arguments,
    )
    arguments |= {"ip_adapter_image": {adapter: [STATUE, OTHER]}, "seed": 0}
    result = sd15.generate(**arguments, ip_adapter_scale=[[0.7, 0.5]], ip_adapter_masks={adapter: masks})
    assert_same(result, expected)
    swapped = sd15.generate(**arguments, ip_adapter_scale=[[0.7, 0.5]], ip_adapter_masks={adapter: masks[::-1]})
    assert_different(result, swapped)


def test_masks_as_diffusers_tensors(sd15: Served) -> None:
    masks = [images.mask(side) for side in ("left", "right")]
    prepared = IPAdapterMaskProcessor().preprocess(masks, height=64, width=64)
    arguments = {**SMALL, "ip_adapter_image": {"plain": [STATUE, OTHER]}, "seed": 0}
    result = sd15.generate(**arguments, ip_adapter_masks={"plain": masks})
    again = sd15.generate(**arguments, ip_adapter_masks={"plain": prepared.reshape(1, 2, 64, 64).numpy()})
    assert_same(again, np.stack([np.asarray(image) for image in result.images]))


@pytest.mark.parametrize("adapter", ["plain", "plus"])
def test_embeddings_equal_those_of_diffusers(sd15: Served, pipe: Any, adapter: str) -> None:
    loaded = pipe(adapter)
    loaded.set_ip_adapter_scale(1.0)
    expected = loaded.prepare_ip_adapter_image_embeds([[STATUE, OTHER]], None, "cpu", 1, True)[0]
    embeds = sd15.client.encode_image(model="sd15", adapter=adapter, images=[STATUE, OTHER])
    np.testing.assert_allclose(embeds, expected.detach().numpy(), atol=1e-4)
    for given in ({adapter: embeds}, {adapter: expected}):
        result = sd15.generate(**SMALL, ip_adapter_image_embeds=given, seed=0)
        assert_same(result, oracle.generate(loaded, ip_adapter_image_embeds=[expected], **SMALL))


def test_embeddings_without_guidance(sd15: Served, pipe: Any) -> None:
    embeds = sd15.client.encode_image(model="sd15", adapter="plain", images=[STATUE])
    loaded = pipe("plain")
    loaded.set_ip_adapter_scale(1.0)
    arguments = {**SMALL, "guidance_scale": 1.0}
    expected = oracle.generate(loaded, ip_adapter_image_embeds=[torch.from_numpy(embeds[1:])], **arguments)
    for given in (embeds, embeds[1:]):
        assert_same(sd15.generate(**arguments, ip_adapter_image_embeds={"plain": given}, seed=0), expected)


def test_negative_image_prompt(sd15: Served, pipe: Any) -> None:
    positive, negative = (
        sd15.client.encode_image(model="sd15", adapter="plus", images=[i])[1] for i in (STATUE, OTHER)
    )
    loaded = pipe("plus")
    loaded.set_ip_adapter_scale(1.0)
    expected = oracle.generate(
        loaded, ip_adapter_image_embeds=[torch.from_numpy(np.stack([negative, positive]))], **SMALL
    )
    arguments = {**SMALL, "ip_adapter_image": {"plus": STATUE}, "seed": 0}
    result = sd15.generate(**arguments, negative_ip_adapter_image={"plus": OTHER})
    assert_same(result, expected)
    assert_different(result, sd15.generate(**arguments))


def test_start_and_end_of_an_adapter(sd15: Served) -> None:
    loaded, steps = (
        oracle.pipeline(sd15.bundle.checkpoints / "base", sd15.bundle.adapters[:1], scheduler="DDIMScheduler"),
        6,
    )
    loaded.set_ip_adapter_scale(0.0)

    def switch(pipeline: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipeline.set_ip_adapter_scale(0.9 if index + 1 in (2, 3) else 0.0)
        return values

    arguments = {**SMALL, "num_inference_steps": steps, "scheduler": "DDIMScheduler"}
    expected = oracle.generate(
        loaded, ip_adapter_image=STATUE, callback_on_step_end=switch, **{**SMALL, "num_inference_steps": steps}
    )
    arguments |= {"ip_adapter_image": {"plain": STATUE}, "ip_adapter_scale": 0.9, "seed": 0}
    result = sd15.generate(**arguments, ip_adapter_start=0.3, ip_adapter_end=0.7)
    assert_same(result, expected)
    assert_different(result, sd15.generate(**arguments))


def test_weight_types(sd15: Served, pipe: Any) -> None:
    arguments = {**SMALL, "ip_adapter_image": {"plain": STATUE}, "seed": 0}
    results = {
        name: sd15.generate(**arguments, ip_adapter_weight_type=name)
        for name in ("linear", "style", "composition", "style and composition", "ease in", "ease out", "strong middle")
    }
    loaded = pipe("plain")
    loaded.set_ip_adapter_scale({"down": {"block_2": 1.0}})
    assert_same(results["composition"], oracle.generate(loaded, ip_adapter_image=STATUE, **SMALL))
    loaded.set_ip_adapter_scale({"mid": 1.0, "down": 0.2, "up": 0.2})
    assert_same(results["strong middle"], oracle.generate(loaded, ip_adapter_image=STATUE, **SMALL))
    for name in results.keys() - {"linear"}:
        assert_different(results["linear"], results[name])


@pytest.mark.parametrize(
    ("parameter", "arguments"),
    [
        ("ip_adapter_scale", {"ip_adapter_image": {"plain": STATUE, "plus": OTHER}, "ip_adapter_scale": [1, 2, 3, 4]}),
        ("ip_adapter_scale", {"ip_adapter_image": {"plain": STATUE}, "ip_adapter_scale": float("nan")}),
        ("ip_adapter_scale", {"ip_adapter_image": {"plain": STATUE}, "ip_adapter_scale": {"up": {"block_9": 1.0}}}),
        ("ip_adapter_scale", {"ip_adapter_image": {"plain": STATUE}, "ip_adapter_scale": [[0.1, 0.2]]}),
        ("ip_adapter_image", {"ip_adapter_image": {"nobody": STATUE}}),
        ("ip_adapter_image", {"ip_adapter_image": [STATUE, OTHER]}),
        ("ip_adapter_image_embeds", {"ip_adapter_image_embeds": {"plain": np.zeros((2, 1, 7), np.float32)}}),
        ("ip_adapter_masks", {"ip_adapter_masks": {"plain": [images.mask("left")]}}),
        (
            "ip_adapter_masks",
            {"ip_adapter_image": {"plain": STATUE}, "ip_adapter_masks": {"plain": [images.mask("left")] * 2}},
        ),
        ("ip_adapter_start", {"ip_adapter_image": {"plain": STATUE}, "ip_adapter_start": 0.9, "ip_adapter_end": 0.1}),
        ("ip_adapter_weight_type", {"ip_adapter_image": {"plain": STATUE}, "ip_adapter_weight_type": "loud"}),
    ],
)
def test_refusals_of_image_prompts_name_the_parameter(sd15: Served, parameter: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        sd15.generate(**SMALL, **arguments)
    assert caught.value.parameter == parameter
