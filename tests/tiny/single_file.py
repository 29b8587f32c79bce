"""Write the tiny folders as single files with the names of Stability's own code, the reverse of `from_single_file`.

The names follow `scripts/convert_diffusers_to_original_stable_diffusion.py` and its SDXL sibling in diffusers'
repository.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .weights import generator, normal

Weights = dict[str, torch.Tensor]

_UNET_LAYERS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def write_base(folder: str | Path, file: str | Path) -> Path:
    """Write the pipeline in `folder` to `file`: flat tensors (`.safetensors`), or a nested dict (`.ckpt`)."""
    folder = Path(folder)
    config = json.loads((folder / "unet/config.json").read_text())
    weights = _renamed(_weights(folder / "unet"), "model.diffusion_model.", _unet_names(config))
    weights |= _vae(folder / "vae", "first_stage_model.")
    text = _weights(folder / "text_encoder")
    if (folder / "text_encoder_2").exists():
        weights |= _clip(text, "conditioner.embedders.0.transformer.")
        weights |= _open_clip(_weights(folder / "text_encoder_2"), "conditioner.embedders.1.model.")
    elif json.loads((folder / "text_encoder/config.json").read_text())["hidden_act"] == "gelu":
        weights |= _open_clip(text, "cond_stage_model.model.")
    else:
        weights |= _clip(text, "cond_stage_model.transformer.")
    return _write(weights, Path(file))


def write_vae(folder: str | Path, file: str | Path) -> Path:
    """Write the VAE in `folder` to `file`, with its own names alone."""
    return _write(_vae(Path(folder), ""), Path(file))


def write_controlnet(folder: str | Path, file: str | Path) -> Path:
    """Write the ControlNet in `folder` to `file`."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    names, blocks = _unet_names(config), len(config["conditioning_embedding_out_channels"]) * 2 - 2

    def name(layer: str) -> str:
        kind, *rest = layer.split(".")
        if kind == "controlnet_cond_embedding":
            places = {"conv_in": 0, "conv_out": 2 * blocks + 2}
            return f"input_hint_block.{places[rest[0]] if rest[0] in places else 2 * int(rest[1]) + 2}"
        if kind == "controlnet_down_blocks":
            return f"zero_convs.{rest[0]}.0"
        return "middle_block_out.0" if kind == "controlnet_mid_block" else names(layer)

    return _write(_renamed(_weights(folder), "control_model.", name), Path(file))


def _unet_names(config: dict[str, Any]) -> Callable[[str], str]:
    """Return the function from diffusers' names of layers to the original ones."""
    count = config["layers_per_block"]
    ups = config.get("up_block_types", ())

    def name(layer: str) -> str:
        if layer in _UNET_LAYERS:
            return _UNET_LAYERS[layer]
        kind, *parts = layer.split(".")
        if kind == "mid_block":
            block, index, *rest = parts
            place = f"middle_block.{1 if block == 'attentions' else 2 * int(index)}"
        else:
            level, block, number, rest = int(parts[0]), parts[1], int(parts[2]), parts[3:]
            if block == "downsamplers":
                return f"input_blocks.{(level + 1) * (count + 1)}.0.op"
            if block == "upsamplers":
                attends = "CrossAttn" in ups[level]
                return f"output_blocks.{level * (count + 1) + count}.{1 + attends}.conv"
            first = level * (count + 1) + (kind == "down_blocks")
            side = {"down_blocks": "input", "up_blocks": "output"}[kind]
            place = f"{side}_blocks.{first + number}.{int(block == 'attentions')}"
        inner = ".".join(rest)
        return f"{place}.{_UNET_RESNET[inner] if block == 'resnets' else inner}"

    return name


def _vae(folder: Path, prefix: str) -> Weights:
    levels = len(json.loads((folder / "config.json").read_text())["block_out_channels"])

    def name(layer: str) -> str:
        side, _, rest = layer.partition(".")
        parts = rest.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut").split(".")
        if parts[0] == "mid_block":
            if parts[1] == "attentions":
                return f"{side}.mid.attn_1.{_VAE_ATTENTION['.'.join(parts[3:])]}"
            return ".".join((side, "mid", f"block_{int(parts[2]) + 1}", *parts[3:]))
        if parts[0] in ("down_blocks", "up_blocks"):
            level = int(parts[1]) if parts[0] == "down_blocks" else levels - 1 - int(parts[1])
            place = f"{side}.{parts[0].removesuffix('_blocks')}.{level}"
            if parts[2].endswith("samplers"):
                return f"{place}.{parts[2].removesuffix('rs')}.conv"
            return ".".join((place, "block", *parts[3:]))
        return ".".join(filter(None, (side, *parts)))

    weights = _renamed(_weights(folder), prefix, name)
    # In the original, the projections of the attention layer are 1 x 1 convolutions.
    return {n: v[:, :, None, None] if ".attn_1." in n and v.dim() == 2 else v for n, v in weights.items()}


def _clip(weights: Weights, prefix: str) -> Weights:
    """Name a text encoder of transformers, with the buffer that old files have."""
    positions = torch.arange(len(weights["text_model.embeddings.position_embedding.weight"]))[None]
    return {f"{prefix}{n}": v for n, v in (weights | {"text_model.embeddings.position_ids": positions}).items()}


def _open_clip(weights: Weights, prefix: str) -> Weights:
    """Name a text encoder as OpenCLIP does, with its projection, which SD 2.1 does not use."""
    found = {name.removeprefix("text_model."): value for name, value in weights.items()}
    width = found["final_layer_norm.weight"].shape[0]
    projection = found.pop("text_projection.weight", None)
    named = {
        "token_embedding.weight": found.pop("embeddings.token_embedding.weight"),
        "positional_embedding": found.pop("embeddings.position_embedding.weight"),
        "ln_final.weight": found.pop("final_layer_norm.weight"),
        "ln_final.bias": found.pop("final_layer_norm.bias"),
        "text_projection": normal(generator(0), width, width) if projection is None else projection.t().contiguous(),
        "logit_scale": torch.tensor(4.6),
    }
    for index in range(1 + max(int(name.split(".")[2]) for name in found)):
        layer, block = f"encoder.layers.{index}", f"transformer.resblocks.{index}"
        for end in ("weight", "bias"):
            parts = [found.pop(f"{layer}.self_attn.{part}_proj.{end}") for part in "qkv"]
            named[f"{block}.attn.in_proj_{end}"] = torch.cat(parts)
            for old, new in _CLIP_LAYER.items():
                named[f"{block}.{new}.{end}"] = found.pop(f"{layer}.{old}.{end}")
    assert not found, f"no name for {', '.join(found)}"
    return {f"{prefix}{name}": value for name, value in named.items()}


def _renamed(weights: Weights, prefix: str, name: Callable[[str], str]) -> Weights:
    """Rename layers; a name is that of a layer and of its parameter, `weight` or `bias`."""
    parts = {old: old.rpartition(".") for old in weights}
    return {f"{prefix}{name(layer)}.{end}": weights[old] for old, (layer, _, end) in parts.items()}


def _weights(folder: Path) -> Weights:
    return load_file(next(folder.glob("*.safetensors")))


def _write(weights: Weights, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in weights.items()}, file)
    else:
        torch.save({"state_dict": weights, "global_step": 875000}, file)
    return file
