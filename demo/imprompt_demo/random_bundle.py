"""A tiny bundle with random weights, for as long as there is no trained one: it shows that all parts run, no more."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection

BUNDLE = """\
name = "random"
base = "base"

[[ip_adapter]]
name = "plain"
path = "."
subfolder = "models"
weight_name = "ip-adapter_random.safetensors"

[shapes]
height = [64, 64, 128]
width = [64, 64, 128]
rows = [1, 2, 8]
"""
WIDTH, VOCABULARY = 32, 514


@torch.no_grad()
def write(folder: Path) -> Path:
    """Write checkpoints and bundle file into `folder`; returns the path of the bundle file."""
    torch.manual_seed(0)
    tokenizer = _tokenizer(folder / "base" / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=VOCABULARY - 2, eos_token_id=VOCABULARY - 1,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32,
        patch_size=8, projection_dim=WIDTH,
    )  # fmt: skip
    unet = _lively(
        UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            cross_attention_dim=WIDTH,
            attention_head_dim=4,
            norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
    )
    vae = _lively(
        AutoencoderKL(
            block_out_channels=(16, 16, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=8,
            sample_size=64,
        )
    )
    latents = torch.randn(4, 4, 8, 8)
    unet.conv_out.weight /= unet(latents, 500, torch.randn(4, 77, WIDTH)).sample.std()
    vae.decoder.conv_out.weight *= 0.5 / vae.decode(latents / vae.config.scaling_factor).sample.std()
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=_lively(CLIPTextModel(text)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "base")
    _lively(CLIPVisionModelWithProjection(vision)).save_pretrained(folder / "models" / "image_encoder")
    save_file(_adapter(unet), folder / "models" / "ip-adapter_random.safetensors")
    (folder / "bundle.toml").write_text(BUNDLE)
    return folder / "bundle.toml"


def _lively(model: Any) -> Any:
    """Weights large enough for a network to react to its inputs."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=1.4 / math.sqrt(parameter[0].numel()))
    return model.eval()


def _adapter(unet: Any) -> dict[str, torch.Tensor]:
    weights = {
        "image_proj.proj.weight": torch.randn(4 * WIDTH, WIDTH) / math.sqrt(WIDTH),
        "image_proj.proj.bias": torch.zeros(4 * WIDTH),
        "image_proj.norm.weight": torch.ones(WIDTH),
        "image_proj.norm.bias": torch.zeros(WIDTH),
    }
    for index, name in enumerate(unet.attn_processors):
        if index % 2:
            width = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for part in ("k", "v"):
                weights[f"ip_adapter.{index}.to_{part}_ip.weight"] = torch.randn(width, WIDTH) / math.sqrt(WIDTH) * 2
    return weights


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's 256 bytes, the same as the end of a word, start and end; no merges: a token for each letter."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    letters = [chr(code) for code in printable] + [chr(256 + code) for code in range(256 - len(printable))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return CLIPTokenizer.from_pretrained(folder)
