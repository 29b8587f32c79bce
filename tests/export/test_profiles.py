"""Optimization profiles: ranges of axes for engines that are built for ranges."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import msgspec
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from imprompt_export import graphs, image_prompt
from imprompt_export.control import residuals
from imprompt_export.profiles import Profile, batch_range, check_axes, profiles
from imprompt_serving.denoiser.batch import Batcher, RowSlice
from imprompt_serving.denoiser.conditioning import Conditioner
from imprompt_serving.denoiser.job import Job
from imprompt_serving.errors import InvalidRequest
from imprompt_serving.gpu.tensorrt import ProfileLimits, profile_for
from imprompt_serving.job_request import AdapterOptions
from imprompt_serving.pipeline.image_prompts import ImagePromptPlan, check_tokens
from imprompt_serving.specs import Adapter, Bundle, Motion, Range, Shapes, T2IAdapter, TextEncoder
from jobs import job_request
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


PLUS = Adapter(name="plus", kind="plus", num_tokens=16, image_encoder="plus", embed_shape=(257, 80))
PLAIN = Adapter(name="plain", kind="plain", num_tokens=4, image_encoder="plain", embed_shape=(80,))


def bundle(shapes: Shapes = SHAPES, adapters: tuple[Adapter, ...] = (PLUS,)) -> Bundle:
    model = unet()
    return Bundle(
        name="tiny",
        family="sd15",
        latent_channels=4,
        unet_channels=4,
        vae_scale_factor=8,
        vae_scaling_factor=0.18215,
        preview_factors=((0.0, 0.0, 0.0),) * 4,
        default_height=512,
        default_width=512,
        scheduler="DDIMScheduler",
        scheduler_config={},
        text_encoders=(TextEncoder(engine="text_encoder", max_length=77, pad_token_id=0, hidden_size=48),),
        max_clip_skip=1,
        layers=tuple(image_prompt.cross_attention_layers(model)),
        transformer_per_block={},
        adapters=adapters,
        residuals=residuals(model),
        motion=Motion(window=32),
        shapes=shapes,
    )


ROWS = [(1, 1, 1), (2, 2, 2), (3, 4, 4), (5, 8, 8), (9, 16, 16)]
"""Smallest, usual, and largest number of rows in each profile, for calls of up to 16 rows."""


def test_profiles_of_a_unet() -> None:
    """There are two profiles for each bucket of rows: one for lists of pictures and one for regions."""
    spec = bundle()
    found = profiles(graphs.unet(unet(), ["plus"], spec.residuals), spec)
    assert [tuple(batch for (batch,) in profile["timestep"]) for profile in found] == ROWS * 2
    picture, regions = found[4], found[9]
    assert picture["sample"] == ((9, 4, 8, 8), (16, 4, 64, 64), (16, 4, 96, 128))
    assert picture["encoder_hidden_states"] == ((9, 77, 48), (16, 77, 48), (16, 616, 48))
    assert picture["ip_mask_plus_0"] == ((9, 1, 64), (16, 1, 4096), (16, 1, 96 * 128))
    assert picture["mid_residual"] == ((9, 64, 4, 4), (16, 64, 32, 32), (16, 64, 48, 64))
    assert picture["ip_tokens_plus"] == ((9, 1, 1, 48), (16, 1, 16, 48), (16, 1, 64, 48))
    assert regions["ip_tokens_plus"] == ((9, 1, 1, 48), (16, 2, 16, 48), (16, 3, 16, 48))
    assert regions["sample"] == picture["sample"]


def test_profiles_for_a_single_size_are_exact() -> None:
    """Engines for one picture size are tuned for exactly that size and for the rows of their bucket."""
    spec = bundle(sizes(height=Range(512, 512, 512), width=Range(512, 512, 512), rows=Range(1, 2, 2), regions=1))
    one, two = profiles(graphs.unet(unet(), ["plus"], spec.residuals), spec)
    assert set(one["sample"]) == {(1, 4, 64, 64)}
    assert set(two["sample"]) == {(2, 4, 64, 64)}
    assert set(two["mid_residual"]) == {(2, 64, 32, 32)}


@pytest.mark.parametrize(("most", "largest"), [(1, [1]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_every_number_of_rows_has_a_profile(most: int, largest: list[int]) -> None:
    spec = bundle(sizes(rows=Range(1, 1, most), regions=1))
    found = [profile["timestep"] for profile in profiles(graphs.unet(unet(), ["plus"]), spec)]
    assert [high for _, _, (high,) in found] == largest
    assert [rows for (low,), _, (high,) in found for rows in range(low, high + 1)] == list(range(1, most + 1))


def test_without_regions_there_is_one_profile_per_bucket() -> None:
    spec = bundle(msgspec.structs.replace(SHAPES, regions=1))
    found = profiles(graphs.unet(unet(), ["plus"]), spec)
    assert [profile["ip_tokens_plus"][2] for profile in found] == [(most, 1, 64, 48) for _, _, most in ROWS]


def test_projection_takes_the_maximum_number_of_pictures_of_a_request() -> None:
    graph = graphs.image_projection("plus", torch.nn.Identity(), {"image_embeds": (257, 80)})
    (only,) = profiles(graph, bundle())
    assert only["image_embeds"] == ((1, 257, 80), (1, 257, 80), (64 // 16, 257, 80))


def test_odd_sizes_are_halved_as_in_convolutions() -> None:
    spec = bundle(msgspec.structs.replace(SHAPES, height=Range(72, 72, 72), width=Range(72, 72, 72)))
    picture, *_ = profiles(graphs.unet(unet(), ["plus"], spec.residuals), spec)
    assert {shape[-2:] for shape in picture["mid_residual"]} == {(5, 5)}


def test_clips_trade_rows_for_frames() -> None:
    """Every clip that fits a call fits a profile, and no profile is far larger than a call."""
    spec = bundle()
    found = [p["sample"] for p in profiles(graphs.unet(unet(), ["plus"], frames=True), spec)]
    bounds = {(low[2], high[2]): 0 for low, _, high in found}
    for low, _, high in found:
        bounds[low[2], high[2]] = max(bounds[low[2], high[2]], high[0])
    assert bounds == {(2, 7): 8, (8, 31): 2, (32, 32): 1}
    for frames in range(SHAPES.frames.min, 33):
        rows = max(SHAPES.rows.max // frames, 1)
        assert any(low <= frames <= high and rows <= most for (low, high), most in bounds.items())


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
def test_range_of_the_batch(name: str, expected: Range) -> None:
    graph = graphs.Graph(name=name, module=unet(), run=lambda _: (), inputs=(), outputs={}, checks=())
    assert batch_range(graph, bundle()) == expected


def limits(found: list[Profile]) -> list[ProfileLimits]:
    return [{name: (low, high) for name, (low, _, high) in profile.items()} for profile in found]


def sizes(**changed: object) -> Shapes:
    return msgspec.structs.replace(SHAPES, **changed)


@pytest.mark.parametrize(
    "shapes",
    [
        SHAPES,
        sizes(height=Range(512, 512, 512), width=Range(512, 512, 512)),
        sizes(height=Range(72, 72, 88), width=Range(64, 72, 80), regions=1),
        sizes(rows=Range(1, 1, 1), frames=Range(1, 1, 1), image_tokens=(16,)),
        sizes(image_tokens=(4,), frames=Range(30, 32, 64)),
    ],
)
def test_engines_are_compared_within_their_profiles(shapes: Shapes) -> None:
    """The sizes cover every profile, and PyTorch accepts them too."""
    spec = bundle(shapes)
    made = [
        graphs.unet(unet(), ["plus"], spec.residuals),
        graphs.unet(unet(), ["plus"], spec.residuals, frames=True),
        graphs.image_projection("plus", torch.nn.Identity(), {"image_embeds": (257, 80)}),
    ]
    for graph in made:
        allowed = limits(profiles(graph, spec))
        used = set()
        for axes in check_axes(graph, spec):
            example = graph.example(axes)
            used.add(profile_for(tuple((name, tuple(tensor.shape)) for name, tensor in example.items()), allowed))
        assert used == set(range(len(allowed)))


def test_comparisons_vary_all_axes() -> None:
    spec = bundle()
    found = check_axes(graphs.unet(unet(), ["plus"], spec.residuals), spec)
    assert [axes["batch"] for axes in found] == [1, *[1, 2, 4, 6, 10] * 2]
    prompts = [(axes["groups_plus"], axes["tokens_plus"]) for axes in found]
    assert prompts == [(1, 1), *[(1, 16)] * 5, *[(2, 16)] * 5]
    smallest, picture, *_ = found
    assert (smallest["h"], smallest["w"], smallest["q0"]) == (8, 8, 64)
    assert (picture["h"], picture["w"], picture["q0"], picture["h1"]) == (16, 24, 16 * 24, 8)
    assert smallest["scale"] == 0
    assert picture["scale"] > 0


def test_comparison_sizes_are_multiples_that_t2i_adapters_need() -> None:
    sketch = T2IAdapter(name="sketch", channels=1, downscale_factor=16)
    spec = msgspec.structs.replace(bundle(sizes(height=Range(72, 512, 1000))), t2i_adapters=(sketch,))
    graph = graphs.vae_encoder(_Vae(), 8)
    assert [(axes["height"], axes["width"]) for axes in check_axes(graph, spec)] == [(80, 64), (144, 192)]


class _Vae(torch.nn.Module):
    class config:  # noqa: N801
        latent_channels = 4


KINDS = ("absent", "one", "many", "masked")
"""The ways in which a request can use an adapter."""
TWO = bundle(adapters=(PLUS, PLAIN))


class Projection:
    """A projection that returns tokens of zeros."""

    def __init__(self, adapter: Adapter) -> None:
        self.tokens = adapter.num_tokens

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"tokens": np.zeros((len(tensors["image_embeds"]), self.tokens, 48), np.float32)}


def job(spec: Bundle, kinds: Mapping[str, str]) -> Job:
    """Make the job of a picture with guidance that uses each adapter in one of `KINDS`."""
    options: list[AdapterOptions] = []
    plans: list[ImagePromptPlan] = []
    tensors: dict[str, torch.Tensor] = {}
    for prefix in ("", "negative_"):
        tensors[f"{prefix}prompt_embeds"] = torch.zeros(1, 77, 48)
    for adapter in spec.adapters:
        kind = kinds[adapter.name]
        if kind == "absent":
            continue
        options.append(AdapterOptions(name=adapter.name))
        count = {"one": 1, "many": SHAPES.image_tokens[-1] // adapter.num_tokens, "masked": SHAPES.regions}[kind]
        for prefix in ("", "negative_"):
            tensors[f"{prefix}image_embeds_{adapter.name}"] = torch.zeros(count, *adapter.embed_shape)
        if kind == "masked":
            tensors[f"ip_adapter_masks_{adapter.name}"] = torch.ones(count, 64, 64)
        pictures = (b"",) * count
        masks = pictures if kind == "masked" else ()
        plans.append(
            ImagePromptPlan(
                adapter=adapter,
                files=pictures,
                negatives=(),
                embeds=None,
                masks=masks,
                shares=1,
                options=options[-1],
            )
        )
    check_tokens(tuple(plans), spec)
    request = job_request(id="-".join(kinds.values()), num_inference_steps=1, adapters=tuple(options))
    conditioner = Conditioner(spec, {adapter.name: Projection(adapter) for adapter in spec.adapters})
    return Job(request, spec, conditioner(request, tensors), tensors)


def jobs(spec: Bundle) -> Iterator[tuple[tuple[str, ...], Job | None]]:
    """Yield each combination of uses with its job; None if it is refused."""
    for kinds in itertools.product(KINDS, repeat=len(spec.adapters)):
        try:
            yield kinds, job(spec, dict(zip((adapter.name for adapter in spec.adapters), kinds, strict=True)))
        except InvalidRequest as error:
            if "next to several masks of another adapter" not in str(error):
                raise
            yield kinds, None


def test_jobs_that_can_share_a_call_fit_a_profile() -> None:
    """Try all pairs of uses; combinations that fit no profile are refused."""
    spec = msgspec.structs.replace(TWO, backend="tensorrt")
    allowed = limits(profiles(graphs.unet(unet(), ["plus", "plain"]), spec))
    found = dict(jobs(spec))
    assert {kinds for kinds, made in found.items() if made is None} == {("many", "masked"), ("masked", "many")}
    together = [made for made in found.values() if made is not None]
    batcher, tried = Batcher(spec), 0
    for one, other in itertools.combinations_with_replacement(together, 2):
        if one.batch_key == other.batch_key:
            inputs = batcher.inputs([RowSlice(one, 0, one.rows), RowSlice(other, 0, other.rows)])
            profile_for(tuple((name, tuple(tensor.shape)) for name, tensor in inputs.items()), allowed)
            tried += 1
    assert tried > len(together)


def test_engines_without_profiles_batch_all_jobs_together() -> None:
    found = dict(jobs(TWO))
    assert None not in found.values()
    assert len({made.batch_key for made in found.values() if made is not None}) == 1
