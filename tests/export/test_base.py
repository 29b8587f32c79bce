"""Bases, VAEs, UNets, and ControlNets as single files or variants load as in diffusers; wrong ones are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from safetensors.torch import load_file, save_file

from imprompt_export import BundleError, BundleFile
from imprompt_export.base import load_base
from imprompt_export.checks import check_checkpoints
from imprompt_export.control import load_controlnets
from imprompt_export.single_files import CONFIGS, default_config
from tiny import base, control, layout, single_file

MAKE = {"sd15": base.make_sd15, "sd2": base.make_sd2, "sdxl": base.make_sdxl}
PIPELINES = {"sdxl": diffusers.StableDiffusionXLPipeline}
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a base of each family in a folder and in both formats of single files, with configurations of their own."""
    folder = tmp_path_factory.mktemp("base")
    for name, make in MAKE.items():
        made = make(folder / name, **({"layers_per_block": 1} if name == "sdxl" else {"levels": 2}))  # type: ignore[operator]
        single_file.write_base(made, folder / f"{name}.safetensors")
        layout.copy_configuration(made, folder / f"{name}-config")
    single_file.write_base(folder / "sd15", folder / "sd15.ckpt")
    base.make_sd15(folder / "other", levels=2, seed=7)
    single_file.write_vae(folder / "other/vae", folder / "vae.pth")
    control.make_controlnet(folder / "depth", levels=2)
    single_file.write_controlnet(folder / "depth", folder / "depth.safetensors")
    return folder


def bundle(root: Path, text: str) -> BundleFile:
    (root / "bundle.toml").write_text(f'name = "tiny"\n{text}')
    made = BundleFile.load(root / "bundle.toml")
    check_checkpoints(made)
    return made


def file_of(name: str) -> str:
    """Write the keys of a base in a single file."""
    return f'base = "{name}"\nconfig = "{Path(name).stem}-config"\n'


def assert_equal(loaded: Any, expected: Any) -> None:
    ours, theirs = loaded.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert not [name for name, value in ours.items() if not torch.equal(value, theirs[name])]


@pytest.mark.parametrize("name", ["sd15.safetensors", "sd15.ckpt", "sd2.safetensors", "sdxl.safetensors"])
def test_single_files_have_the_weights_of_the_folder(root: Path, name: str) -> None:
    family = Path(name).stem
    ours = load_base(bundle(root, file_of(name)))
    theirs = diffusers.DiffusionPipeline.from_pretrained(root / family)
    assert type(ours) is PIPELINES.get(family, diffusers.StableDiffusionPipeline)
    for part in PARTS:
        if hasattr(theirs, part):
            assert_equal(getattr(ours, part), getattr(theirs, part))
            assert not getattr(ours, part).training
    assert ours.scheduler.config == theirs.scheduler.config
    assert ours.tokenizer.pad_token_id == theirs.tokenizer.pad_token_id


def test_a_file_in_a_folder_is_named_by_weight_name(root: Path) -> None:
    text = 'base = "."\nweight_name = "sd15.safetensors"\nconfig = "sd15-config"\n'
    expected = diffusers.UNet2DConditionModel.from_pretrained(root / "sd15/unet")
    assert_equal(load_base(bundle(root, text)).unet, expected)


@pytest.mark.parametrize(
    ("section", "source"),
    [
        ('[vae]\npath = "other/vae"', "other/vae"),
        ('[vae]\npath = "vae.pth"', "other/vae"),
        ('[vae]\npath = "sd15.safetensors"\nconfig = "other/vae"', "sd15/vae"),
        ('[unet]\npath = "other/unet"', "other/unet"),
        ('[unet]\npath = "other/unet/diffusion_pytorch_model.safetensors"', "other/unet"),
        ('[unet]\npath = "other"\nweight_name = "unet/diffusion_pytorch_model.safetensors"', "other/unet"),
    ],
)
@pytest.mark.parametrize("start", ['base = "sd15"\n', file_of("sd15.safetensors")])
def test_parts_are_replaced(root: Path, start: str, section: str, source: str) -> None:
    pipeline = load_base(bundle(root, start + section))
    part = Path(source).name
    model = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}[part]
    assert_equal(getattr(pipeline, part), model.from_pretrained(root / source))
    assert_equal(pipeline.text_encoder, diffusers.DiffusionPipeline.from_pretrained(root / "sd15").text_encoder)


def test_a_file_without_vae_needs_one_of_its_own(root: Path) -> None:
    weights = load_file(root / "sd15.safetensors")
    save_file({n: v for n, v in weights.items() if "first_stage" not in n}, root / "no_vae.safetensors")
    text = 'base = "no_vae.safetensors"\nconfig = "sd15-config"\n'
    assert_equal(
        load_base(bundle(root, f'{text}[vae]\npath = "other/vae"')).vae,
        diffusers.AutoencoderKL.from_pretrained(root / "other/vae"),
    )
    refused(root, text, r"no_vae\.safetensors has no vae, .*; add the vae that belongs to it in \[vae\]")


def test_a_variant_is_loaded(root: Path) -> None:
    layout.as_variant(Path(shutil.copytree(root / "sd15", root / "half")), "fp16")
    pipeline = load_base(bundle(root, 'base = "half"\nvariant = "fp16"'))
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(root / "half", variant="fp16", dtype=torch.float32)
    for part in PARTS[:3]:
        assert_equal(getattr(pipeline, part), getattr(theirs, part))
        assert getattr(pipeline, part).dtype == torch.float32


@pytest.mark.parametrize("keys", ['path = "depth.safetensors"\nconfig = "depth"', 'path = "depth"'])
def test_controlnets_load_from_files_and_folders(root: Path, keys: str) -> None:
    made = bundle(root, f'base = "sd15"\n[[controlnet]]\nname = "depth"\n{keys}')
    loaded = load_controlnets(made, load_base(made).unet)["depth"]
    assert_equal(loaded, diffusers.ControlNetModel.from_pretrained(root / "depth"))


def test_a_controlnet_without_configuration_has_the_layout_of_the_base(root: Path) -> None:
    """Its embedding of control images has the usual widths, unlike that of the tiny ControlNets."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(root / "sd15/unet")
    diffusers.ControlNetModel.from_unet(unet).save_pretrained(root / "usual")
    single_file.write_controlnet(root / "usual", root / "usual.safetensors")
    made = bundle(root, 'base = "sd15"\n[[controlnet]]\nname = "n"\npath = "usual.safetensors"')
    assert_equal(load_controlnets(made, unet)["n"], diffusers.ControlNetModel.from_pretrained(root / "usual"))


@pytest.mark.parametrize(("layout_", "config"), CONFIGS.items())
def test_default_configurations_are_those_of_diffusers(tmp_path: Path, layout_: tuple[int, int], config: str) -> None:
    """The files have only the tensors by which diffusers tells the models apart."""
    width, channels = layout_
    unet = "model.diffusion_model"
    shapes: dict[str, tuple[int, ...]] = {f"{unet}.input_blocks.0.0.weight": (1, channels, 1, 1)}
    place = f"{unet}.input_blocks.{4 if width == 2048 else 2}.1.transformer_blocks.0.attn2.to_k.weight"
    shapes[place] = (1, width)
    if width == 2048:
        shapes["conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"] = (1,)
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    assert default_config(tmp_path / "a.safetensors") == config
    assert fetch_diffusers_config(tensors)["pretrained_model_name_or_path"] == config


def refused(root: Path, text: str, message: str) -> None:
    with pytest.raises(BundleError, match=message) as raised:
        bundle(root, text)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'base = "sd15.safetensors"',
            r"config: sd15\.safetensors comes without its configuration; name the diffusers f",
        ),
        ('base = "sd15.safetensors"\nconfig = "sdxl-config"', "the cross_attention_dim of sd15.* is 48, but .* is 128"),
        ('base = "sd15.safetensors"\nconfig = "sd15-confg"', "config: no such .*did you mean sd15-config"),
        ('base = "sd15.safetensors"\nconfig = "depth"', "base: .*depth cannot be loaded .*: it is a ControlNet"),
        ('base = "sd15"\nconfig = "sd15-config"', "config: only a single file needs one"),
        (file_of("sd15.safetensors") + 'variant = "fp16"', "variant: only diffusers folders have variants"),
        ('base = "sd15"\nvariant = "fp16"', 'variant: no part of .*sd15 has weights of the variant "fp16"'),
        (
            'base = "sd15"\n[vae]\npath = "depth.safetensors"',
            r"vae: .*depth\.safetensors is a ControlNet; expected a VAE",
        ),
        ('base = "sd15"\n[vae]\npath = "depth"', "vae: .*depth is a ControlNet; expected a VAE"),
        ('base = "sd15"\n[unet]\npath = "vae.pth"', r"unet: .*vae\.pth is a VAE; expected a UNet"),
        (
            'base = "vae.pth"',
            r"base: .*vae\.pth is a VAE; expected a checkpoint in a single file or a diffusers folder",
        ),
        (
            'base = "sd15"\n[[controlnet]]\nname = "n"\npath = "sd15.ckpt"',
            "is a checkpoint in a .*; expected a ControlNet",
        ),
        ('base = "sd15"\nvarient = "fp16"', "no such key: varient; did you mean variant"),
    ],
)
def test_wrong_files_are_refused(root: Path, text: str, message: str) -> None:
    refused(root, text, message)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("output_blocks.0.0.", r"base: cut\.safetensors is incomplete: it lacks weights of its configuration"),
        ("text_model.encoder.layers.2", r"base: text_encoder is incomplete: it has no encoder\.layers\.2\.\w+.*, "),
    ],
)
def test_a_file_that_lacks_weights_is_refused(root: Path, lost: str, message: str) -> None:
    """diffusers would leave those of text encoders without values."""
    weights = load_file(root / "sd15.safetensors")
    save_file({name: value for name, value in weights.items() if lost not in name}, root / "cut.safetensors")
    made = bundle(root, 'base = "cut.safetensors"\nconfig = "sd15-config"\n')
    with pytest.raises(BundleError, match=message):
        load_base(made)


@pytest.mark.parametrize(
    ("section", "kind", "changed"),
    [
        ("num_inference_steps = 4\nguidance_scale = 0", "PNDMScheduler", {}),
        ('scheduler = "LCMScheduler"', "LCMScheduler", {}),
        (
            'scheduler = "EulerDiscreteScheduler"\n[defaults.scheduler_config]\ntimestep_spacing = "trailing"',
            "EulerDiscreteScheduler",
            {"timestep_spacing": "trailing"},
        ),
        (
            'scheduler_config = { prediction_type = "v_prediction" }',
            "PNDMScheduler",
            {"prediction_type": "v_prediction"},
        ),
    ],
)
def test_the_scheduler_of_the_bundle_is_made_as_in_diffusers(
    root: Path, section: str, kind: str, changed: dict[str, Any]
) -> None:
    scheduler = load_base(bundle(root, f'base = "sd15"\n[defaults]\n{section}')).scheduler
    own = diffusers.PNDMScheduler.from_pretrained(root / "sd15", subfolder="scheduler")
    expected = (
        own if kind == "PNDMScheduler" and not changed else getattr(diffusers, kind).from_config(own.config, **changed)
    )
    assert type(scheduler).__name__ == kind
    assert json.dumps(dict(scheduler.config), sort_keys=True) == json.dumps(dict(expected.config), sort_keys=True)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("num_inference_steps = 0", "defaults.num_inference_steps: must be 1 to 1000, got 0"),
        ("guidance_scale = nan", "defaults.guidance_scale: must be a number"),
        ("guidance_rescale = 2", "defaults.guidance_rescale: must be 0 to 1, got 2"),
        ("steps = 4", "no such key: steps"),
        ('scheduler = "LCMSheduler"', "defaults.scheduler: 'LCMSheduler' is not one of .*; did you mean LCMScheduler"),
    ],
)
def test_wrong_defaults_are_refused(root: Path, section: str, message: str) -> None:
    refused(root, f'base = "sd15"\n[defaults]\n{section}', message)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('timestep_spacng = "trailing"', "PNDMScheduler has no timestep_spacng; did you mean timestep_spacing"),
        ('beta_schedule = "cosy"', "defaults.scheduler_config: PNDMScheduler: .*cosy"),
    ],
)
def test_wrong_scheduler_configurations_are_refused(root: Path, config: str, message: str) -> None:
    made = bundle(root, f'base = "sd15"\n[defaults]\nscheduler_config = {{ {config} }}')
    with pytest.raises(BundleError, match=message):
        load_base(made)
