"""ControlNets, T2I-Adapters, motion adapters and LoRA files that fit the tiny bases.

diffusers initializes their last layers to zero, so that they have no effect before training. Here those layers are
random as well, because a checkpoint without effect proves nothing.
"""

from pathlib import Path
from typing import Literal

import torch
from diffusers import ControlNetModel, MotionAdapter, T2IAdapter, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

from .base import TEXT_ENCODER, Family, text_config, unet_config
from .images import control_image, pixels
from .weights import calibrate, generator, normal, private_rng, randomize

LoraFormat = Literal["kohya", "peft", "diffusers"]
CONTROL_ONLY = ("up_block_types", "sample_size")  # options of a UNet that a ControlNet does not have


def make_controlnet(
    folder: str | Path, *, family: Family = "sd15", layers_per_block: int | None = None, levels: int = 4, seed: int = 0
) -> Path:
    """Write a ControlNetModel with the blocks of the tiny UNet, conditioned on an RGB picture."""
    config = unet_config(family, layers_per_block, levels)
    config = {key: value for key, value in config.items() if key not in CONTROL_ONLY}
    with private_rng():
        controlnet = ControlNetModel(**config, conditioning_embedding_out_channels=(8, 16, 16, 16))
        # A gain of two compensates for silu, which halves small values, so that the picture outweighs the biases.
        gains = ((r"controlnet_(down|mid)_block.*weight$", 0.5), (r"controlnet_cond_embedding", 2.0))
        randomize(controlnet, seed + 20, gains)
        embedding = controlnet.controlnet_cond_embedding
        pictures = torch.stack([pixels(control_image(kind, index)) for kind in ("canny", "depth") for index in (0, 1)])
        # Match the variance of the sample, to which the embedding is added.
        calibrate(embedding.conv_out, lambda: embedding(pictures), 1.0)
        controlnet.save_pretrained(folder)
    return Path(folder)


def make_t2i_adapter(folder: str | Path, *, family: Family = "sd15", levels: int = 4, seed: int = 0) -> Path:
    """Write a T2IAdapter (`full_adapter`, or `full_adapter_xl` for SDXL), conditioned on an RGB picture."""
    kind, downscale_factor = {"sd15": ("full_adapter", 8), "sdxl": ("full_adapter_xl", 16)}[family]
    with private_rng():
        adapter = T2IAdapter(
            in_channels=3,
            channels=[32, 64, 64, 64][:levels],
            num_res_blocks=2,
            downscale_factor=downscale_factor,
            adapter_type=kind,
        )
        randomize(adapter, seed + 21, ((r"weight$", 1.4),))
        adapter.save_pretrained(folder)
    return Path(folder)


def make_motion_adapter(
    folder: str | Path,
    *,
    max_seq_length: int = 32,
    mid_block: bool = True,
    layers_per_block: int | None = None,
    levels: int = 4,
    seed: int = 0,
) -> Path:
    """Write a MotionAdapter for the tiny SD1.5 UNet. `mid_block=False` is the layout of AnimateDiff v3."""
    config = unet_config("sd15", layers_per_block, levels)
    with private_rng():
        adapter = MotionAdapter(
            block_out_channels=config["block_out_channels"],
            motion_layers_per_block=config["layers_per_block"],
            motion_norm_num_groups=config["norm_num_groups"],  # diffusers uses the UNet's value, so both must agree
            motion_num_attention_heads=8,
            motion_max_seq_length=max_seq_length,
            use_motion_mid_block=mid_block,
        )
        randomize(adapter, seed + 22)
        adapter.save_pretrained(folder)
    return Path(folder)


def make_lora(
    folder: str | Path,
    *,
    fmt: LoraFormat = "kohya",
    family: Family = "sd15",
    weight_name: str = "pytorch_lora_weights.safetensors",
    text_encoder: bool = False,
    layers_per_block: int | None = None,
    levels: int = 4,
    rank: int = 4,
    gain: float = 0.25,
    seed: int = 0,
) -> Path:
    """Write a LoRA file for all layers that LCM-LoRA changes, and return its path.

    `kohya` is the format of LCM-LoRA (`lora_unet_*`, with an alpha of half the rank); `peft` and `diffusers` are the
    new and the old format of diffusers' training scripts. `text_encoder` adds the attention layers of the (first) text
    encoder.
    """
    rng = generator(seed + 23)
    weights: dict[str, Tensor] = {}
    for part, name, layer in _lora_targets(family, layers_per_block, levels, text_encoder):
        down, up = _lora_pair(rng, layer, rank, gain)
        if fmt == "kohya":
            prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_" if family == "sdxl" else "lora_te_"}[part]
            key = prefix + name.replace(".", "_")
            weights[f"{key}.alpha"] = torch.tensor(rank / 2)
            weights[f"{key}.lora_down.weight"], weights[f"{key}.lora_up.weight"] = down, up
        else:
            old = "lora" if part == "unet" else "lora_linear_layer"
            first, second = {"peft": ("lora_A", "lora_B"), "diffusers": (f"{old}.down", f"{old}.up")}[fmt]
            weights[f"{part}.{name}.{first}.weight"], weights[f"{part}.{name}.{second}.weight"] = down, up
    path = Path(folder) / weight_name
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path)
    return path


def _lora_targets(
    family: Family, layers_per_block: int | None, levels: int, text_encoder: bool
) -> list[tuple[str, str, nn.Linear | nn.Conv2d]]:
    """List (unet or text_encoder, module name, layer) for the UNet's blocks and the text encoder's attention."""
    with private_rng(), torch.device("meta"):
        unet = UNet2DConditionModel(**unet_config(family, layers_per_block, levels))
        targets = [
            ("unet", name, module)
            for name, module in unet.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and "_block" in name
        ]
        if text_encoder:
            config = text_config(*TEXT_ENCODER[family])
            for index in range(config.num_hidden_layers):
                for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
                    # The name used in LoRA files, which differs from the module name in current transformers.
                    name = f"text_model.encoder.layers.{index}.self_attn.{projection}"
                    targets.append(("text_encoder", name, nn.Linear(config.hidden_size, config.hidden_size)))
    return targets


def _lora_pair(rng: torch.Generator, layer: nn.Linear | nn.Conv2d, rank: int, gain: float) -> tuple[Tensor, Tensor]:
    outputs, inputs, *kernel = layer.weight.shape
    fan_in = layer.weight[0].numel()
    down = normal(rng, rank, inputs, *kernel, std=fan_in**-0.5)
    return down, normal(rng, outputs, rank, *(1 for _ in kernel), std=gain * rank**-0.5)
