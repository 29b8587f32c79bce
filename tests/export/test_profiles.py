"""Ranges of axes, as engines that are built for ranges are told."""

from __future__ import annotations

import msgspec
import pytest
import torch
from diffusers import UNet2DConditionModel

from imprompt_export import graphs, image_prompt
from imprompt_export.control import residuals
from imprompt_export.profiles import batch, profiles
from imprompt_serving.specs import Adapter, Bundle, Motion, Range, Shapes, TextEncoder
from tiny import base

SHAPES = Shapes(
    height=Range(64, 512, 768),
    width=Range(64, 512, 1024),
    rows=Range(2, 4, 16),
    frames=Range(2, 16, 64),
    image_tokens=(4, 16, 64),
    regions=3,
)


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(**base.unet_config("sd15", levels=2))


def bundle(shapes: Shapes = SHAPES) -> Bundle:
    model = unet()
    plus = Adapter(name="plus", kind="plus", num_tokens=16, image_encoder="plus", embed_shape=(257, 80))
    return Bundle(
        name="tiny",
        family="sd15",
        latent_channels=4,
        unet_channels=4,
        vae_scale_factor=8,
        vae_scaling_factor=0.18215,
        default_height=512,
        default_width=512,
        scheduler="DDIMScheduler",
        scheduler_config={},
        text_encoders=(TextEncoder(engine="text_encoder", max_length=77, pad_token_id=0, hidden_size=48),),
        max_clip_skip=1,
        layers=tuple(image_prompt.cross_attention_layers(model)),
        transformer_per_block={},
        adapters=(plus,),
        residuals=residuals(model),
        motion=Motion(window=32),
        shapes=shapes,
    )


def test_a_unet() -> None:
    spec = bundle()
    picture, regions = profiles(graphs.unet(unet(), ["plus"], spec.residuals), spec)
    assert picture["sample"] == ((1, 4, 8, 8), (4, 4, 64, 64), (16, 4, 96, 128))
    assert picture["timestep"] == ((1,), (4,), (16,))
    assert picture["encoder_hidden_states"] == ((1, 77, 48), (4, 77, 48), (16, 77, 48))
    assert picture["ip_mask_plus_0"] == ((1, 1, 64), (4, 1, 4096), (16, 1, 96 * 128))
    assert picture["mid_residual"] == ((1, 64, 4, 4), (4, 64, 32, 32), (16, 64, 48, 64))
    assert picture["ip_tokens_plus"] == ((1, 1, 1, 48), (4, 1, 16, 48), (16, 1, 64, 48))
    assert regions["ip_tokens_plus"] == ((1, 1, 1, 48), (4, 2, 16, 48), (16, 3, 16, 48))
    assert regions["sample"] == picture["sample"]


def test_without_regions_there_is_one_profile() -> None:
    spec = bundle(msgspec.structs.replace(SHAPES, regions=1))
    (only,) = profiles(graphs.unet(unet(), ["plus"]), spec)
    assert only["ip_tokens_plus"][2] == (16, 1, 64, 48)


def test_as_many_pictures_are_projected_as_a_request_may_have() -> None:
    graph = graphs.image_projection("plus", torch.nn.Identity(), {"image_embeds": (257, 80)})
    (only,) = profiles(graph, bundle())
    assert only["image_embeds"] == ((1, 257, 80), (1, 257, 80), (64 // 16, 257, 80))


def test_odd_sizes_are_halved_as_convolutions_do() -> None:
    spec = bundle(msgspec.structs.replace(SHAPES, height=Range(72, 72, 72), width=Range(72, 72, 72)))
    picture, _ = profiles(graphs.unet(unet(), ["plus"], spec.residuals), spec)
    assert {shape[-2:] for shape in picture["mid_residual"]} == {(5, 5)}


def test_clips_trade_rows_for_frames() -> None:
    """Every clip that fits a call fits a profile, and no profile is for many times more than a call holds."""
    spec = bundle()
    found = [p["sample"] for p in profiles(graphs.unet(unet(), ["plus"], frames=True), spec)]
    bounds = {(low[2], high[0], high[2]) for low, _, high in found}
    assert bounds == {(2, 8, 7), (8, 2, 31), (32, 1, 32)}
    for frames in range(SHAPES.frames.min, 33):
        rows = max(SHAPES.rows.max // frames, 1)
        assert any(low <= frames <= high and rows <= most for low, most, high in bounds)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("unet", Range(1, 4, 16)),
        ("controlnet_depth", Range(1, 4, 16)),
        ("text_encoder", Range(1, 1, 16)),
        ("controlnet_embedding_depth", Range(1, 1, 16)),
        ("vae_decoder", Range(1, 1, 2)),
    ],
)
def test_batches(name: str, expected: Range) -> None:
    graph = graphs.Graph(name=name, module=unet(), run=lambda _: (), inputs=(), outputs={}, checks=())
    assert batch(graph, bundle()) == expected
