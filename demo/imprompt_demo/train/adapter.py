"""The two IP-Adapters: train the projection and the `to_k_ip` / `to_v_ip` layers with the base frozen.

The reference is usually another picture with the same look, so that the text determines the thing and the image
determines the look. If the caption is empty, the reference is the picture itself. See https://arxiv.org/abs/2308.06721.
"""

import copy
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel, UNetMotionModel
from diffusers.models.attention_processor import (
    AttentionProcessor,
    AttnProcessor,
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
)
from diffusers.models.embeddings import ImageProjection, IPAdapterPlusImageProjection
from torch import Tensor, nn

from . import diffusion
from .clip import WIDTH
from .data import LAYOUTS
from .loop import Plan, fit
from .text import Captions

PLAN = Plan(steps=3000, batch=16, rate=1e-3, average=0.997)
TOKENS = {"plain": 4, "plus": 16}
FILES = {"plain": "ip-adapter_world.safetensors", "plus": "ip-adapter-plus_world.safetensors"}
_SHORT_FULL_EMPTY = (0.7, 0.1, 0.2)
_NO_IMAGE = 0.08


def build(kind: str, unet: UNet2DConditionModel, weights: dict[str, Tensor] | None = None) -> UNet2DConditionModel:
    """Copy the base and add an adapter, whose parameters are the only ones that require gradients.

    `weights` is in the public layout of `public_weights`; without it, the adapter is untrained.
    """
    torch.manual_seed(4)
    model = copy.deepcopy(unet).requires_grad_(False)
    nested = _nested(weights) if weights else _initial(kind, model)
    model._load_ip_adapter_weights([nested], low_cpu_mem_usage=False)
    use_plain_attention(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("encoder_hid_proj" in name or "_ip." in name)
    return model


def set_scale(model: nn.Module, scale: float) -> None:
    """Set the scale of the image prompt in every layer."""
    for module in model.modules():
        if isinstance(module, IPAdapterAttnProcessor):
            module.scale = [scale]


def use_plain_attention(model: UNet2DConditionModel | UNetMotionModel) -> None:
    """Switch to processors without fused attention: equivalent, and faster to train on a CPU at these sizes."""
    processors: dict[str, AttentionProcessor] = {}
    for name, old in model.attn_processors.items():
        if isinstance(old, (IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0)):
            plain = IPAdapterAttnProcessor(old.hidden_size, old.cross_attention_dim, old.num_tokens, old.scale)
            plain.load_state_dict(old.state_dict())
            processors[name] = plain
        else:
            processors[name] = AttnProcessor()
    model.set_attn_processor(processors)


def train(
    kind: str,
    folder: Path,
    unet: UNet2DConditionModel,
    latents: Tensor,
    captions: Captions,
    features: tuple[Tensor, Tensor],
    plan: Plan = PLAN,
) -> UNet2DConditionModel:
    """Train one adapter.

    `features` holds the image features of all pictures, [N, ...], and those for no image, [1, ...] (zeros for plain,
    the features of a gray picture for plus).
    """
    model = build(kind, unet)
    known, nothing = features

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (plan.batch,), generator=generator)
        text, caption_kind = captions.draw(rows, _SHORT_FULL_EMPTY, generator)
        sibling = torch.randint(LAYOUTS, (plan.batch,), generator=generator)
        same = (torch.rand(plan.batch, generator=generator) < 0.2) | (caption_kind == 2)
        reference = torch.where(same, rows, rows // LAYOUTS * LAYOUTS + sibling)
        image = known[reference].float()
        absent = torch.rand(plan.batch, generator=generator) < _NO_IMAGE
        image[absent] = nothing.float()
        noise, timestep = diffusion.draw(plan.batch, (4, 16, 16), generator)
        clean = latents[rows]
        noisy = diffusion.noised(clean, noise, timestep)
        prediction = model(noisy, timestep, text, added_cond_kwargs={"image_embeds": [image[:, None]]}).sample
        return diffusion.loss_v(prediction, clean, noise, timestep)

    fit(kind, folder, model, plan, loss, seed=4)
    return model


def public_weights(kind: str, model: UNet2DConditionModel) -> dict[str, Tensor]:
    """Convert the adapter to the public file layout: flat `image_proj.*` and `ip_adapter.<N>.to_k_ip.weight`, N odd."""
    projection = model.encoder_hid_proj.image_projection_layers[0]
    weights = {f"image_proj.{_public_name(key)}": value for key, value in projection.state_dict().items()}
    if kind == "plus":
        for layer in range(4):
            key, value = (weights.pop(f"image_proj.layers.{layer}.0.to_{part}.weight") for part in "kv")
            weights[f"image_proj.layers.{layer}.0.to_kv.weight"] = torch.cat([key, value])
    number = 1
    for name, processor in model.attn_processors.items():
        if name.endswith("attn2.processor"):
            for part in ("to_k_ip", "to_v_ip"):
                weights[f"ip_adapter.{number}.{part}.weight"] = getattr(processor, part)[0].weight
            number += 2
    return {key: value.detach().half().contiguous() for key, value in weights.items()}


def _nested(weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Group flat public weights by their first part, as `_load_ip_adapter_weights` expects, in float32."""
    grouped: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in weights.items():
        part, rest = key.split(".", 1)
        grouped[part][rest] = value.float()
    return grouped


def _initial(kind: str, unet: UNet2DConditionModel) -> dict[str, dict[str, Tensor]]:
    """Initialize weights for `_load_ip_adapter_weights`; the image keys and values start as copies of the text ones."""
    projection: nn.Module
    if kind == "plain":
        projection = ImageProjection(image_embed_dim=WIDTH, cross_attention_dim=WIDTH, num_image_text_embeds=4)
    else:
        projection = IPAdapterPlusImageProjection(WIDTH, WIDTH, WIDTH, depth=4, heads=WIDTH // 64, num_queries=16)
    image = {_public_name(key): value for key, value in projection.state_dict().items()}
    for layer in range(4 if kind == "plus" else 0):
        parts = [image.pop(f"layers.{layer}.0.to_{part}.weight") for part in "kv"]
        image[f"layers.{layer}.0.to_kv.weight"] = torch.cat(parts)
    attention = {}
    number = 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            layer_module = unet.get_submodule(name.removesuffix(".processor"))
            attention[f"{number}.to_k_ip.weight"] = layer_module.to_k.weight
            attention[f"{number}.to_v_ip.weight"] = layer_module.to_v.weight
            number += 2
    return {"image_proj": image, "ip_adapter": attention}


def _public_name(key: str) -> str:
    """Rename a key of diffusers' projection modules to the layout of the published checkpoints."""
    if key.startswith("image_embeds"):
        return key.replace("image_embeds", "proj")
    for layer in range(4):
        start = f"layers.{layer}."
        table = {"ln0": "0.norm1", "ln1": "0.norm2", "attn.to_out.0": "0.to_out", "attn.": "0."}
        table |= {"ff.0": "1.0", "ff.1.net.0.proj": "1.1", "ff.1.net.2": "1.3"}
        for ours, public in table.items():
            if key.startswith(start + ours):
                return start + public + key.removeprefix(start + ours)
    return key
