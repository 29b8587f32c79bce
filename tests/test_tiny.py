"""The tiny checkpoints load in diffusers, react to every ingredient, and only depend on their seed."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from tiny import images
from tiny.adapters import WEIGHT_NAMES, make_adapter, make_image_encoder
from tiny.base import Family, make_sd15, make_sdxl
from tiny.control import make_controlnet, make_lora, make_motion_adapter, make_t2i_adapter
from tiny.oracle import Adapter, Pictures, generate, picture_distance, pipeline, show_face
from tiny.tokenizer import write_tokenizer

CLEAR = 3.0  # mean difference in levels of 255: thirty times what a parity test allows
PIPELINES = {"sd15": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}
INPAINT = {"sd15": diffusers.StableDiffusionInpaintPipeline, "sdxl": diffusers.StableDiffusionXLInpaintPipeline}
MAKE = {"sd15": make_sd15, "sdxl": make_sdxl}
FAMILIES: tuple[Family, ...] = ("sd15", "sdxl")


def differ(first: Any, second: Any, at_least: float = CLEAR) -> bool:
    return picture_distance(first, second)[1] >= at_least


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make bases of both families, and image encoders in the layout of the public repositories."""
    root = tmp_path_factory.mktemp("tiny")
    for family in FAMILIES:
        MAKE[family](root / family)
    make_image_encoder(root / "adapters/models/image_encoder", kind="vit_h")
    make_image_encoder(root / "adapters/sdxl_models/image_encoder", kind="big_g")
    return root


@pytest.mark.parametrize(
    "make",
    [make_sd15, make_sdxl, make_image_encoder, make_adapter, make_controlnet, make_motion_adapter, make_lora],
    ids=lambda make: make.__name__,
)
def test_files_only_depend_on_the_seed(make: Callable[..., Path], tmp_path: Path) -> None:
    def digest(name: str, seed: int) -> str:
        make(tmp_path / name, seed=seed)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = digest("first", 0)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert digest("second", 0) == first
    assert digest("third", 1) != first


def test_tokenizer_works_like_that_of_clip(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, pad_token="!")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.model_max_length) == (0, len(tokenizer) - 1, 77)
    ids = tokenizer(["a photo of a cat", "a photo of a dog", "Zażółć 猫 42"]).input_ids
    assert ids[0] != ids[1]
    assert len(tokenizer.tokenize("photo")) == 1
    assert tokenizer.decode(ids[2], skip_special_tokens=True) == "zażółć 猫 4 2"


def test_pooled_text_is_read_at_the_end_token(root: Path) -> None:
    encoder = CLIPTextModelWithProjection.from_pretrained(root / "sdxl/text_encoder_2")
    tokenizer = CLIPTokenizer.from_pretrained(root / "sdxl/tokenizer_2")
    short = tokenizer("a cat", return_tensors="pt").input_ids
    padded = tokenizer("a cat", padding="max_length", return_tensors="pt").input_ids
    assert padded.shape == (1, 77)
    with torch.no_grad():
        torch.testing.assert_close(encoder(short).text_embeds, encoder(padded).text_embeds, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_vary_with_inputs_and_are_stable(root: Path, family: Family) -> None:
    pipe = pipeline(root / family, cls=PIPELINES[family])
    picture = generate(pipe)
    assert picture.shape == (1, 64, 64, 3)
    assert picture.std() > 30
    assert np.isin(picture, (0, 255)).mean() < 0.1
    assert differ(picture, generate(pipe, prompt="a photo of a dog"))
    assert differ(picture, generate(pipe, negative_prompt="blurry"))
    assert differ(picture, generate(pipe, seed=1))
    assert generate(pipe, height=72, width=96).shape == (1, 72, 96, 3)
    rng = torch.Generator().manual_seed(0)
    for parameter in pipe.unet.parameters():
        parameter.data.mul_(1 + 1e-6 * torch.randn(parameter.shape, generator=rng))
    assert picture_distance(picture, generate(pipe))[0] <= 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("in_channels", [4, 9])
def test_inpainting_reacts_to_its_inputs(root: Path, tmp_path: Path, family: Family, in_channels: int) -> None:
    folder = root / family if in_channels == 4 else MAKE[family](tmp_path, in_channels=9)
    pipe = pipeline(folder, cls=INPAINT[family])
    assert pipe.unet.config.in_channels == in_channels

    def paint(photo: int = 0, mask: str = "left", strength: float = 0.8) -> Pictures:
        picture = images.photo(photo, (64, 64))
        return generate(pipe, image=picture, mask_image=images.mask(mask), height=64, width=64, strength=strength)

    reference = paint()
    assert differ(reference, paint(photo=1))
    assert differ(reference, paint(mask="circle"))
    assert differ(reference, paint(strength=0.5))


def test_distilled_unet_takes_the_guidance_scale(tmp_path: Path) -> None:
    pipe = pipeline(make_sd15(tmp_path, time_cond_proj_dim=32))
    assert type(pipe.scheduler).__name__ == "LCMScheduler"
    assert differ(generate(pipe, guidance_scale=1.0), generate(pipe, guidance_scale=8.0))


def test_safety_checker_flags_some_pictures(tmp_path: Path) -> None:
    pipe = pipeline(make_sd15(tmp_path, safety_checker=True), safety_checker=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(6)]
    output = pipe(["a cat"] * 6, num_inference_steps=2, generator=generators)
    assert set(output.nsfw_content_detected) == {False, True}


@pytest.mark.parametrize(("family", "kind", "encoder"), WEIGHT_NAMES)
def test_adapter_loads_and_matters(root: Path, family: Family, kind: Any, encoder: Any) -> None:
    path = make_adapter(root / "adapters", kind, family=family, encoder=encoder)
    faces, components, adapter = kind.startswith("faceid"), {}, Adapter(path=root / "adapters", weight_name=path.name)
    if faces:
        adapter = Adapter(path=root / "adapters", weight_name=path.name, subfolder=None, image_encoder_folder=None)
        if "plus" in kind:
            vision = CLIPVisionModelWithProjection.from_pretrained(root / "adapters/models/image_encoder")
            components["image_encoder"] = vision
    else:
        folder = {"vit_h": "models/image_encoder", "big_g": "sdxl_models/image_encoder"}[encoder]
        adapter = Adapter(
            path=root / "adapters", subfolder=path.parent.name, weight_name=path.name, image_encoder_folder=folder
        )
    pipe = pipeline(root / family, [adapter], cls=PIPELINES[family], **components)
    has_lora = any("lora_A" in name for name in pipe.unet.state_dict())
    assert has_lora == (kind in ("faceid", "faceid_plus", "faceid_plusv2"))

    def draw(seed: int = 0, scale: float = 0.8, photo: int = 0) -> Pictures:
        pipe.set_ip_adapter_scale(scale)
        if not faces:
            return generate(pipe, ip_adapter_image=images.photo(seed), num_inference_steps=2)
        if "plus" in kind:
            show_face(pipe, [images.photo(photo)], shortcut=kind.endswith("v2"))
        return generate(pipe, ip_adapter_image_embeds=[images.face_embeds(seed=seed)], num_inference_steps=2)

    reference = draw()
    assert differ(reference, draw(seed=1))
    assert differ(reference, draw(scale=0.7))
    assert differ(reference, draw(scale=0.0), at_least=15)
    if faces and "plus" in kind:
        assert differ(reference, draw(photo=1))


def test_bin_and_safetensors_files_hold_the_same_weights(tmp_path: Path) -> None:
    nested = torch.load(make_adapter(tmp_path, weight_name="ip-adapter_sd15.bin"), weights_only=True)
    assert set(nested) == {"image_proj", "ip_adapter"}
    assert list(nested["ip_adapter"])[:3] == ["1.to_k_ip.weight", "1.to_v_ip.weight", "3.to_k_ip.weight"]
    with safe_open(make_adapter(tmp_path), framework="pt") as flat:
        assert set(flat.keys()) == {f"{part}.{key}" for part in nested for key in nested[part]}
        assert torch.equal(flat.get_tensor("image_proj.proj.weight"), nested["image_proj"]["proj.weight"])


@pytest.mark.parametrize("family", FAMILIES)
def test_controlnet_matters(root: Path, tmp_path: Path, family: Family) -> None:
    controlnet = diffusers.ControlNetModel.from_pretrained(make_controlnet(tmp_path, family=family))
    classes = {
        "sd15": diffusers.StableDiffusionControlNetPipeline,
        "sdxl": diffusers.StableDiffusionXLControlNetPipeline,
    }
    pipe = pipeline(root / family, cls=classes[family], controlnet=controlnet)

    def draw(kind: str = "canny", scale: float = 1.0) -> Pictures:
        return generate(pipe, image=images.control_image(kind), controlnet_conditioning_scale=scale)

    assert differ(draw(), draw("depth"))
    assert differ(draw(), draw(scale=0.0))
    assert differ(draw(), draw(scale=0.8))


@pytest.mark.parametrize("family", FAMILIES)
def test_t2i_adapter_matters(root: Path, tmp_path: Path, family: Family) -> None:
    adapter = diffusers.T2IAdapter.from_pretrained(make_t2i_adapter(tmp_path, family=family))
    classes = (diffusers.StableDiffusionAdapterPipeline, diffusers.StableDiffusionXLAdapterPipeline)
    pipe = pipeline(root / family, cls=classes[FAMILIES.index(family)], adapter=adapter)

    def draw(kind: str = "canny", scale: float = 1.0) -> Pictures:
        return generate(pipe, image=images.control_image(kind), adapter_conditioning_scale=scale)

    assert differ(draw(), draw("depth"))
    assert differ(draw(), draw(scale=0.0))


@pytest.mark.parametrize("mid_block", [True, False])
def test_motion_adapter_matters(root: Path, tmp_path: Path, mid_block: bool) -> None:
    motion = diffusers.MotionAdapter.from_pretrained(make_motion_adapter(tmp_path, mid_block=mid_block))
    config = {"beta_schedule": "linear", "clip_sample": False, "timestep_spacing": "linspace", "steps_offset": 1}
    pipe = pipeline(root / "sd15", (), diffusers.AnimateDiffPipeline, "DDIMScheduler", config, motion_adapter=motion)
    clip = generate(pipe, num_frames=4, height=64, width=64)
    assert clip.shape == (1, 4, 64, 64, 3)
    for name, parameter in pipe.unet.named_parameters():
        if "motion_modules" in name and ".proj_out." in name:
            parameter.data.zero_()
    assert differ(clip, generate(pipe, num_frames=4, height=64, width=64), at_least=15)


@pytest.mark.parametrize("fmt", ["kohya", "peft", "diffusers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_loads_and_matters(root: Path, tmp_path: Path, family: Family, fmt: Any) -> None:
    path = make_lora(tmp_path, fmt=fmt, family=family, text_encoder=True)
    pipe = pipeline(root / family, cls=PIPELINES[family])
    without = generate(pipe, num_inference_steps=2)
    pipe.load_lora_weights(tmp_path, weight_name=path.name)
    layers = sum("lora_A" in name for part in (pipe.unet, pipe.text_encoder) for name in part.state_dict())
    with safe_open(path, framework="pt") as file:
        assert layers == sum(key.endswith(("lora_A.weight", "down.weight")) for key in file.keys())  # noqa: SIM118
    assert differ(without, generate(pipe, num_inference_steps=2), at_least=10)


def test_layers_per_block_applies_to_base_and_adapter(tmp_path: Path) -> None:
    """Two layers per block make sixteen cross-attention layers, as in the real SD1.5."""
    base = make_sd15(tmp_path / "base", layers_per_block=2)
    path = make_adapter(tmp_path / "adapters", layers_per_block=2)
    make_image_encoder(tmp_path / "adapters/models/image_encoder")
    pipe = pipeline(base, [Adapter(path=tmp_path / "adapters", weight_name=path.name)])
    assert sum("attn2" in name for name in pipe.unet.attn_processors) == 16
    assert generate(pipe, ip_adapter_image=images.photo(), num_inference_steps=1).shape == (1, 64, 64, 3)


def test_files_have_their_public_names(root: Path) -> None:
    with safe_open(root / "sd15/text_encoder/model.safetensors", framework="pt") as file:
        assert "text_model.embeddings.token_embedding.weight" in file.keys()  # noqa: SIM118
    index = json.loads((root / "sd15/model_index.json").read_text())
    assert index["feature_extractor"] == ["transformers", "CLIPImageProcessor"]
    text_encoder = pipeline(root / "sd15").text_encoder
    assert text_encoder.get_input_embeddings().weight.std() > 0.9  # loaded, not newly initialized (0.02)


def test_scheduler_configurations_match_the_public_folders(root: Path) -> None:
    sd15 = json.loads((root / "sd15/scheduler/scheduler_config.json").read_text())
    assert (sd15["_class_name"], sd15["clip_sample"], sd15["steps_offset"]) == ("PNDMScheduler", False, 1)
    ddim = pipeline(root / "sd15", scheduler="DDIMScheduler").scheduler
    assert (ddim.config.clip_sample, ddim.config.set_alpha_to_one) == (False, False)
    sdxl = pipeline(root / "sdxl", cls=PIPELINES["sdxl"])
    assert (type(sdxl.scheduler).__name__, sdxl.scheduler.config.timestep_spacing) == (
        "EulerDiscreteScheduler",
        "leading",
    )
    assert sdxl.vae.config.force_upcast
    assert sdxl.config.force_zeros_for_empty_prompt


def test_pictures_are_deterministic_and_have_the_requested_size() -> None:
    assert images.photo(3, (80, 48)).size == (80, 48)
    assert picture_distance(images.photo(3), images.photo(3)) == (0, 0.0)
    assert differ(images.photo(3), images.photo(4), at_least=15)
    assert np.asarray(images.mask("left", (10, 4))).mean(0).tolist() == [255] * 5 + [0] * 5
    assert images.face_embeds(faces=2).shape == (2, 2, 512)
    with pytest.raises(ValueError, match="cannot compare"):
        picture_distance(images.photo(), images.photo(0, (64, 64)))
