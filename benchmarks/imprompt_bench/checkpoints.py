"""Write checkpoints for a preset, in the public file layouts, with random weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    MotionAdapter,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)
from transformers.utils import logging as transformers_logging

from imprompt_bench.presets import Preset
from imprompt_bench.results import BenchError

TOKENS = 4
VOCABULARY = 49408
"""Rows of CLIP's token embedding; the tokenizer below uses only the first few hundred."""
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
ADAPTER = "plain"

BUNDLE = """\
name = "{name}"
base = "base"

[[ip_adapter]]
name = "{adapter}"
path = "."
subfolder = "models"
weight_name = "{weight_name}"
{motion}
[engine]
backend = "{backend}"
precision = "{precision}"

[shapes]
height = {sizes}
width = {sizes}
rows = [1, 2, {rows}]

[limits]
waiting_rows = 16
"""
MOTION = """
[motion_adapter]
path = "motion"
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoints:
    """Paths of the written checkpoints."""

    folder: Path

    weight_name = "ip-adapter_random.safetensors"

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle.toml"


def parameters(preset: Preset) -> dict[str, int]:
    """Count the weights of each network."""
    with torch.device("meta"):
        return {name: sum(p.numel() for p in model.parameters()) for name, model in _networks(preset)}


def check_memory(preset: Preset) -> None:
    """Check that the checkpoints fit into memory while they are written, and the UNet while it is exported.

    An export frees each network before the next, so the UNet's weights are there twice at most: in a file that is
    mapped into memory, and in its engine.

    Raises:
        BenchError: less memory than that is free.
    """
    counts = parameters(preset)
    require("the export", 4 * max(sum(counts.values()), 2 * counts["unet"]) / 2**30)


def require(what: str, gib: float) -> None:
    """Raise `BenchError` if less memory is free than `what` needs."""
    available = psutil.virtual_memory().available / 2**30
    if gib > available:
        raise BenchError(f"{what} needs about {gib:.0f} GiB of memory; {available:.0f} GiB are free")


def silence_libraries() -> None:
    """Silence messages and progress bars that would bury the measurements."""
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


@torch.no_grad()
def write(
    folder: Path,
    name: str,
    preset: Preset,
    *,
    backend: str,
    precision: str,
    sizes: tuple[int, int, int] | None = None,
    rows: int = 16,
) -> Checkpoints:
    """Write the checkpoints and the bundle file of `preset` to `folder`; the weights are reproducible.

    Args:
        sizes: `shapes.height` and `shapes.width`; by default up to twice the size that the UNet is made for.
        rows: the most rows of a UNet call.
    """
    made = Checkpoints(folder=folder)
    torch.manual_seed(0)
    networks = {part: _randomize(model) for part, model in _networks(preset)}
    unet, vae = networks["unet"], networks["vae"]
    _calibrate(unet, vae)
    (folder / "models").mkdir(parents=True, exist_ok=True)
    save_file(_adapter(unet, preset), folder / "models" / made.weight_name)
    networks.pop("image_encoder").save_pretrained(folder / "models" / "image_encoder")
    if preset.motion:
        networks.pop("motion").save_pretrained(folder / "motion")
    tokenizers = {
        f"tokenizer{part}": _tokenizer(made.base / f"tokenizer{part}") for part in ("", "_2")[: len(preset.text)]
    }
    scheduler = DDIMScheduler(**SCHEDULER, clip_sample=False)
    if preset.family == "sdxl":
        pipeline = StableDiffusionXLPipeline(**networks, **tokenizers, scheduler=scheduler, add_watermarker=False)
    else:
        nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = StableDiffusionPipeline(**networks, **tokenizers, **nothing, scheduler=scheduler)
    pipeline.save_pretrained(made.base)
    usual = 8 * preset.unet["sample_size"]
    bundle = BUNDLE.format(
        name=name,
        adapter=ADAPTER,
        weight_name=made.weight_name,
        motion=MOTION * preset.motion,
        backend=backend,
        precision=precision,
        sizes=list(sizes or (32, usual, 2 * usual)),
        rows=rows,
    )
    made.bundle.write_text(bundle)
    return made


def _networks(preset: Preset) -> Iterator[tuple[str, Any]]:
    yield "unet", UNet2DConditionModel(**preset.unet)
    yield "vae", AutoencoderKL(latent_channels=4, **preset.vae)
    classes = (CLIPTextModel, CLIPTextModelWithProjection)
    for part, kind, config in zip(("", "_2"), classes, preset.text, strict=False):
        # The public configurations have 2, which transformers reads as "the highest id in the prompt".
        yield f"text_encoder{part}", kind(CLIPTextConfig(vocab_size=VOCABULARY, eos_token_id=2, **config))
    yield "image_encoder", CLIPVisionModelWithProjection(CLIPVisionConfig(**preset.vision))
    if preset.motion:
        yield (
            "motion",
            MotionAdapter(
                block_out_channels=preset.unet["block_out_channels"],
                motion_layers_per_block=preset.unet["layers_per_block"],
                motion_norm_num_groups=preset.unet.get("norm_num_groups", 32),
                motion_num_attention_heads=preset.unet["attention_head_dim"],
            ),
        )


def _randomize(model: Any) -> Any:
    """Draw variance-preserving weights, so that values stay finite and every input has an effect."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=1 / math.sqrt(parameter[0].numel()))
    return model.eval()


def _calibrate(unet: Any, vae: Any) -> None:
    """Rescale the outputs to predicted noise of unit variance, and pictures that use most of 0..255."""
    latents, text = torch.randn(1, 4, 8, 8), torch.randn(1, 77, unet.config.cross_attention_dim)
    added = {}
    if unet.config.addition_embed_type:
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        added = {"text_embeds": torch.randn(1, pooled), "time_ids": torch.rand(1, 6)}
    unet.conv_out.weight /= unet(latents, 500, text, added_cond_kwargs=added).sample.std()
    vae.decoder.conv_out.weight *= 0.5 / vae.decode(latents / vae.config.scaling_factor).sample.std()


def _adapter(unet: Any, preset: Preset) -> dict[str, Tensor]:
    """Draw a plain adapter: a projection, and keys and values for every cross-attention layer (the odd ones)."""
    width, features = preset.unet["cross_attention_dim"], preset.vision["projection_dim"]
    weights = {
        "image_proj.proj.weight": torch.randn(TOKENS * width, features) / math.sqrt(features),
        "image_proj.proj.bias": torch.zeros(TOKENS * width),
        "image_proj.norm.weight": torch.ones(width),
        "image_proj.norm.bias": torch.zeros(width),
    }
    for index, name in enumerate(unet.attn_processors):
        if index % 2:
            out = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for part in ("k", "v"):
                weights[f"ip_adapter.{index}.to_{part}_ip.weight"] = torch.randn(out, width) / math.sqrt(width) * 2
    return weights


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """Write a CLIP tokenizer without merges: one token per byte, inside or at the end of a word, plus start and end."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    letters = [chr(code) for code in printable] + [chr(256 + code) for code in range(256 - len(printable))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return CLIPTokenizer.from_pretrained(folder)
