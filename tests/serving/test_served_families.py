"""What a family defines for serving, and that a new family needs no changes elsewhere."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import diffusers
import msgspec
import numpy as np
import pytest
import torch

from imprompt_bench import rig
from imprompt_serving import families
from imprompt_serving.denoiser.conditioning import Conditioner
from imprompt_serving.denoiser.schedulers import make_scheduler
from imprompt_serving.errors import InvalidRequest
from imprompt_serving.families import get_family, sd15
from imprompt_serving.job_request import JobRequest, Task
from imprompt_serving.parameters import ROWS, Group
from imprompt_serving.pipeline.request import parse
from imprompt_serving.specs import Bundle, CrossAttention
from imprompt_serving.wire import job_tensors, request_tensors
from jobs import job_request

PREFIXES = {"sd15": "StableDiffusion", "sdxl": "StableDiffusionXL", "sdxl_refiner": "StableDiffusionXL"}
SUFFIXES: dict[Task, str] = {"text-to-image": "", "image-to-image": "Img2Img", "inpainting": "Inpaint"}
PLAIN = rig.sd15(rows=2)
XL = msgspec.structs.replace(PLAIN, family="sdxl", text_encoders=PLAIN.text_encoders * 2, pooled_size=8)


def by_diffusers(family: str, task: Task, parameter: str, *, controlled: bool) -> Any:
    """Return the default in diffusers' pipeline for a task."""
    name = f"{PREFIXES[family]}{'ControlNet' * controlled}{SUFFIXES[task]}Pipeline"
    return inspect.signature(getattr(diffusers, name).__call__).parameters[parameter].default


@pytest.mark.parametrize("family", PREFIXES)
@pytest.mark.parametrize("task", SUFFIXES)
@pytest.mark.parametrize("controlled", [False, True])
def test_defaults_equal_those_of_diffusers(family: str, task: Task, controlled: bool) -> None:
    made = get_family(family)
    guidance_scale = by_diffusers(family, task, "guidance_scale", controlled=controlled)
    assert made.default_guidance_scale(task, controlled=controlled) == guidance_scale
    if task != "text-to-image":
        strength = by_diffusers(family, task, "strength", controlled=controlled)
        assert made.default_strength(task, controlled=controlled) == strength
    if controlled:
        scale = by_diffusers(family, task, "controlnet_conditioning_scale", controlled=True)
        assert made.default_conditioning_scale(task) == scale


def test_family_parameters_match_the_table() -> None:
    """No check would notice a row that no family accepts, or a parameter of a family without a row."""
    rows = {row.name for row in ROWS if row.group is Group.FAMILY}
    assert rows == {name for family in families.NAMES for name in get_family(family).parameters}


def layers(*places: str) -> tuple[CrossAttention, ...]:
    names = (f"{place}.transformer_blocks.0.attn2.processor" for place in places)
    return tuple(CrossAttention(name=name, level=0) for name in names)


ALL = layers(
    *(f"down_blocks.{block}.attentions.{index}" for block in (1, 2) for index in (0, 1)),
    *(f"up_blocks.{block}.attentions.{index}" for block in (1, 2) for index in (0, 1, 2)),
    "mid_block.attentions.0",
)


@pytest.mark.parametrize(
    ("family", "style"),
    [
        ("sd15", ("down_blocks.1.attentions", "up_blocks.2.attentions", "mid_block")),
        ("sdxl", ("up_blocks.1.attentions.1.",)),
    ],
)
def test_layer_roles_of_style_and_composition(family: str, style: tuple[str, ...]) -> None:
    parts = get_family(family).layer_roles(ALL)
    assert parts["composition"] == {layer.name for layer in ALL if layer.name.startswith("down_blocks.2.")}
    assert parts["style"] == {layer.name for layer in ALL if layer.name.startswith(style)}


def test_latents_are_normalized_with_the_statistics_of_their_vae() -> None:
    vae: dict[str, Any] = {"vae_latents_mean": (0.0, 1.0, 2.0, 3.0), "vae_latents_std": (1.0, 2.0, 4.0, 8.0)}
    bundle = msgspec.structs.replace(XL, vae_scaling_factor=0.5, **vae)
    latents = get_family("sdxl").scale_latents(torch.ones(1, 4, 1, 1), bundle)
    assert latents.flatten().tolist() == [0.5, 0.0, -0.125, -0.125]
    assert get_family("sd15").scale_latents(torch.ones(1, 4, 1, 1), bundle).flatten().tolist() == [0.5] * 4


def text(bundle: Bundle, prompts: int = 1) -> dict[str, torch.Tensor]:
    """Make text embeddings of both branches: ones, and zeros for the negative branch."""
    shapes = get_family(bundle.family).text_shapes(bundle)
    positive = {name: torch.ones(prompts, *shape) for name, shape in shapes.items()}
    return positive | {f"negative_{name}": torch.zeros_like(value) for name, value in positive.items()}


def inputs(bundle: Bundle, request: JobRequest) -> Any:
    return Conditioner(bundle, {})(request, text(bundle)).at(0, 1)


@pytest.mark.parametrize("bundle", [PLAIN, XL], ids=lambda bundle: bundle.family)
def test_denoiser_accepts_the_embeddings_of_the_text_encoders(bundle: Bundle) -> None:
    family = get_family(bundle.family)
    answers = [{"hidden_states": np.zeros((1, 77, rig.WIDTH)), "text_embeds": np.zeros((1, 8))}] * 2
    joined = family.join_text(answers[: len(bundle.text_encoders)])
    assert {name: value.shape[1:] for name, value in joined.items()} == family.text_shapes(bundle)
    sent = {tensor.name: tensor.dims for tensor in job_tensors(bundle)}
    for name, shape in family.text_shapes(bundle).items():
        any_length = (-1, *shape[1:]) if len(shape) == 2 else shape  # long prompts have several chunks of tokens
        assert sent[name] == sent[f"negative_{name}"] == (-1, *any_length)


def test_only_sdxl_takes_sizes_as_inputs() -> None:
    request = job_request(original_size=(96, 80), negative_original_size=(32, 32), negative_target_size=(16, 16))
    assert inputs(PLAIN, request).keys() == {"encoder_hidden_states"}
    made = inputs(XL, request)
    assert made["text_embeds"][:, 0].tolist() == [0, 1]
    assert made["time_ids"].tolist() == [[32, 32, 0, 0, 16, 16], [96, 80, 0, 0, 64, 64]]


class Toy(sd15.SD15):
    """A family that differs from SD 1.5 in everything that a family defines."""

    def default_guidance_scale(self, task: Task, *, controlled: bool) -> float:
        return 3.25

    def text_inputs(self, *arguments: Any, **options: Any) -> dict[str, torch.Tensor]:
        inputs = super().text_inputs(*arguments, **options)
        return inputs | {"tone": 2 * inputs["encoder_hidden_states"][:, 0]}

    def scheduler_corrections(self, config: Any, request: Any) -> dict[str, Any]:
        return {"steps_offset": 3}

    def layer_roles(self, layers: Sequence[CrossAttention]) -> dict[str, frozenset[str]]:
        return dict.fromkeys(("style", "composition"), frozenset(layer.name for layer in layers))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A bundle of a family that is registered like any other, with its name in the list and its module."""
    module = ModuleType("toy")
    module.FAMILY = Toy(prompts=("prompt",), parameters=("target_size",))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "imprompt_serving.families.toy", module)
    monkeypatch.setattr(families, "NAMES", (*families.NAMES, "toy"))
    return msgspec.structs.replace(PLAIN, family="toy")


def test_new_family_parses_its_requests(toy: Bundle) -> None:
    request = parse({"prompt": np.array([b"a cat"], object), "target_size": np.array([64, 32], np.int32)}, toy)
    assert (request.settings.guidance_scale, request.settings.target_size) == (3.25, (64, 32))
    taken, usual = ({tensor.name for tensor in request_tensors(b, stream=False)} for b in (toy, PLAIN))
    assert taken - usual == {"target_size"}
    with pytest.raises(InvalidRequest, match="prompt_2"):
        parse({name: np.array([b"a cat"], object) for name in ("prompt", "prompt_2")}, toy)


def test_new_family_conditions_its_jobs(toy: Bundle) -> None:
    made = inputs(toy, job_request())
    assert made["tone"].shape == (2, rig.WIDTH)
    assert made["tone"][:, 0].tolist() == [0, 2]
    assert make_scheduler(toy, job_request()).config.steps_offset == 3


def test_unknown_family_is_refused(toy: Bundle) -> None:
    with pytest.raises(ValueError, match="unknown family 'other'; known families are sd15, sdxl, sdxl_refiner, toy"):
        msgspec.structs.replace(toy, family="other")
