"""Start a run from the weights of a published bundle, so that its stages can train further.

A bundle holds averaged weights in float16 and no optimizer state, so a stage begins at step 0 with a new schedule. The
autoencoder and the encoders cannot train further: a bundle lacks the projection of the text tower, and its autoencoder
is already standardized.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, ControlNetModel, MotionAdapter, StableDiffusionPipeline, UNet2DConditionModel
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextModel, CLIPVisionModelWithProjection

from ..metrics import thing_network
from . import adapter, clip, controlnet, lcm, motion, unet


def start(bundle: Path, run: Path) -> None:
    """Write a checkpoint at step 0 to the folder `run` for every model of the bundle that has none yet."""
    place = bundle / "checkpoints"
    if not (run / "vae.ready").exists():
        torch.save(AutoencoderKL.from_pretrained(place / "base" / "vae").float().state_dict(), run / "vae.ready")
    towers = clip.build(run)
    text = CLIPTextModel.from_pretrained(place / "base" / "text_encoder").float()
    towers.text.text_model.load_state_dict(text.state_dict())
    encoder = CLIPVisionModelWithProjection.from_pretrained(place / "ip-adapter" / "models" / "image_encoder").float()
    towers.vision.load_state_dict(encoder.state_dict())
    _save("clip", run, towers)
    base = unet.build()
    base.load_state_dict(UNet2DConditionModel.from_pretrained(place / "base" / "unet").float().state_dict())
    _save("unet", run, base)
    for kind, file in adapter.FILES.items():
        _save(kind, run, adapter.build(kind, base, load_file(place / "ip-adapter" / "models" / file)))
    lines = controlnet.build(base)
    lines.load_state_dict(ControlNetModel.from_pretrained(place / "controlnet-edges").float().state_dict())
    _save("controlnet", run, lines)
    _save("motion", run, motion.build(base, MotionAdapter.from_pretrained(place / "motion").float()))
    student = lcm.build(base)
    layers = StableDiffusionPipeline.lora_state_dict(place / "lcm-lora")[0]
    set_peft_model_state_dict(student, {_peft_name(key): value.float() for key, value in layers.items()})
    _save("lcm", run, student)
    judge = thing_network()
    judge.load_state_dict({key: value.float() for key, value in load_file(place / "things.safetensors").items()})
    _save("things", run, judge)


def _save(name: str, run: Path, model: nn.Module) -> None:
    file = run / f"{name}.pt"
    if not file.exists():
        weights = {key: value.detach() for key, value in model.named_parameters() if value.requires_grad}
        torch.save({"step": 0, "seconds": 0.0, "mean": weights, "trained": weights}, file)


def _peft_name(key: str) -> str:
    return key.removeprefix("unet.").replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B.")
