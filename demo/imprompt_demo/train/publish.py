"""Write the trained models as a bundle: diffusers folders in float16, the IP-Adapter files, and `bundle.toml`."""

import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer

from ..metrics import thing_network
from . import adapter, controlnet, diffusion, lcm, motion
from .loop import load_mean

_ADAPTERS = """
[[ip_adapter]]
name = "plain"
path = "checkpoints/ip-adapter"
subfolder = "models"
weight_name = "ip-adapter_world.safetensors"

[[ip_adapter]]
name = "plus"
path = "checkpoints/ip-adapter"
subfolder = "models"
weight_name = "ip-adapter-plus_world.safetensors"
"""
_ENGINE = """
[engine]
backend = "onnxruntime"
precision = "fp32"
host = "python"

[shapes]
height = [64, 64, 128]
width = [64, 64, 128]
rows = [1, 2, 32]
"""
BUNDLE = f"""\
# A family of tiny models trained on the picture world of `imprompt_demo`; see MODEL_CARD.md.
name = "world"
base = "checkpoints/base"
{_ADAPTERS}
[[controlnet]]
name = "edges"
path = "checkpoints/controlnet-edges"

[motion_adapter]
path = "checkpoints/motion"
{_ENGINE}frames = [8, 16, 16]
image_tokens = [4, 16, 64]
"""
LCM_BUNDLE = f"""\
# The same base with the LCM-LoRA fused: LCMScheduler, 4 steps, guidance 1.
name = "world_lcm"
base = "checkpoints/base"
{_ADAPTERS}
[[lora]]
path = "checkpoints/lcm-lora"
weight_name = "pytorch_lora_weights.safetensors"
scale = 1.0
{_ENGINE}image_tokens = [4, 16, 64]
"""


def publish(run: Path, out: Path) -> None:
    """Write the models trained so far in the folder `run` to the folder `out`."""
    from .family import Family  # local, because `family` imports this module

    family = Family(run)
    place = out / "checkpoints"
    shutil.rmtree(place, ignore_errors=True)
    towers, unet = family.towers, family.unet
    processor = CLIPImageProcessor(
        size={"shortest_edge": 64},
        crop_size={"height": 64, "width": 64},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        resample=3,
    )
    text_encoder = CLIPTextModel(towers.text.config)
    text_encoder.load_state_dict(towers.text.text_model.state_dict())
    pipe = StableDiffusionPipeline(
        vae=family.vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(run / "tokenizer"),
        unet=unet,
        scheduler=diffusion.scheduler(),
        safety_checker=None,
        feature_extractor=processor,
        requires_safety_checker=False,
    )
    done = {file.stem for file in run.glob("*.pt")}
    folder = place / "ip-adapter" / "models"
    for kind, name in adapter.FILES.items():
        if kind in done:
            folder.mkdir(parents=True, exist_ok=True)
            trained = load_mean(kind, run, adapter.build(kind, unet))
            save_file(adapter.public_weights(kind, trained), folder / name)
    if "controlnet" in done:
        lines = load_mean("controlnet", run, controlnet.build(unet))
        lines.half().save_pretrained(place / "controlnet-edges")
    if "motion" in done:
        layers = motion.untrained()  # `save_motion_modules` writes float32
        weights = load_mean("motion", run, motion.build(unet)).state_dict()
        layers.load_state_dict({key: value for key, value in weights.items() if "motion_modules" in key})
        layers.half().save_pretrained(place / "motion")
    if "lcm" in done:
        student = load_mean("lcm", run, lcm.build(unet))
        pairs = convert_state_dict_to_diffusers(get_peft_model_state_dict(student))
        halves = {key: value.detach().half().contiguous() for key, value in pairs.items()}
        StableDiffusionPipeline.save_lora_weights(place / "lcm-lora", unet_lora_layers=halves)
    if "things" in done:
        judge = load_mean("things", run, thing_network()).half()
        save_file(judge.state_dict(), place / "things.safetensors")
    towers.vision.half().save_pretrained(folder / "image_encoder")
    processor.save_pretrained(folder / "image_encoder")
    pipe.to(torch.float16).save_pretrained(place / "base")
    shutil.copytree(run / "tokenizer", place / "base" / "tokenizer", dirs_exist_ok=True)
    (out / "bundle.toml").write_text(BUNDLE)
    (out / "bundle-lcm.toml").write_text(LCM_BUNDLE)
