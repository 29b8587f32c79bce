"""Define the graphs of a bundle: each declares its inputs, outputs, dynamic axes, check sizes, and tolerance once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from imprompt_export import image_prompt
from imprompt_export.lora import Factors
from imprompt_serving import tensor_names
from imprompt_serving.specs import Residual, feature_names, level_size, residual_names

Axes = dict[str, float]
Model = Any
"""A module of diffusers or transformers; type checkers do not know its attributes."""
EXACT_BUFFERS = {"mean_of_latents": "latents_mean", "std_of_latents": "latents_std"}
"""Buffers with values of a VAE's configuration, by their keys there; they stay in float32 in every precision."""
Precisions = Mapping[str, str]
"""The precision of a graph by the bundle's `engine.precision`, where the two differ."""
AS_ENGINE: Precisions = MappingProxyType({"fp8": "fp16"})
"""The precision of the engine; only the networks of a step compute in fp8."""
WITH_FP8: Precisions = MappingProxyType({})
"""The precision of the engine, also for fp8."""
FULL: Precisions = MappingProxyType({"fp16": "fp32", "bf16": "fp32", "fp8": "fp32"})
FP16_FOR_BF16: Precisions = MappingProxyType({"bf16": "fp16", "fp8": "fp16"})
"""For a VAE: its pictures stay within 2 levels of 255 of float32 in fp16, but not in bf16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """An input tensor; axes with names are dynamic. `values` is the distribution of its example values."""

    name: str
    shape: tuple[int | str, ...]
    values: Literal["normal", "unit", "scale", "timestep", "index", "bias"] = "normal"
    below: int = 0
    exact: bool = False
    """Whether it stays in float32 in every precision, because its values need more than 16 bits."""

    def draw(self, axes: Axes, generator: torch.Generator) -> Tensor:
        """Draw example values: for `index` integers below `below`, for `scale` up to `axes["scale"]`."""
        shape = [int(axes[size]) if isinstance(size, str) else size for size in self.shape]
        if self.values == "scale":
            return axes["scale"] * torch.rand(shape, generator=generator)
        if self.values == "index":
            return torch.randint(self.below, shape, generator=generator)
        if self.values == "unit":
            return torch.rand(shape, generator=generator)
        if self.values == "timestep":
            return torch.rand(shape, generator=generator) * 999
        if self.values == "bias":  # the last token of every other row is padding
            bias = torch.zeros(shape)
            bias[::2, ..., 1:][..., -1:] = PADDING
            return bias
        return torch.randn(shape, generator=generator)


PADDING = -1e4
"""Bias of a padding token: its weight after the softmax is exactly zero, in half precision as well."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Graph:
    """The network of one engine: `run` maps named input tensors to the outputs.

    `checks` are the sizes at which its engine is compared with PyTorch (`profiles.check_axes` for engines that are
    built for ranges). The graph is traced at the last of them, which has no size of 1.
    """

    name: str
    module: nn.Module
    run: Callable[[dict[str, Tensor]], tuple[Tensor, ...]]
    inputs: tuple[Input, ...]
    outputs: dict[str, tuple[int | str, ...]]
    checks: tuple[Axes, ...]
    tolerance: float = 2e-4
    """Largest difference from PyTorch, relative to the largest output value (levels of 255 for pictures)."""
    output_dtypes: dict[str, str] = field(default_factory=dict)
    precisions: Precisions = field(default_factory=lambda: AS_ENGINE)
    loras: Mapping[str, Mapping[str, Factors]] = field(default_factory=dict)
    """Factors of the LoRAs that requests choose for the weights of `module`, by name and layer."""
    fp8_ranges: Mapping[str, float] = field(default_factory=dict)
    """The largest input of each layer that computes in fp8, by the name of the layer in `module`."""
    internal: frozenset[str] = frozenset()
    """Inputs and outputs that are not cast to float32, because the denoiser passes them from engine to engine."""

    @property
    def cast_inputs(self) -> frozenset[str]:
        """The float32 inputs that the graph casts to the type it computes in."""
        return frozenset(
            tensor.name
            for tensor in self.inputs
            if tensor.values != "index" and not tensor.exact and tensor.name not in self.internal
        )

    def precision(self, engine: str) -> str:
        """Return the precision of this graph when `engine.precision` is `engine`."""
        return self.precisions.get(engine, engine)

    def example(self, axes: Axes, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {tensor.name: tensor.draw(axes, generator) for tensor in self.inputs}


def text_encoder(name: str, model: Model, length: int, *, penultimate: bool) -> Graph:
    """Build the graph of a CLIP text encoder for `length` tokens, with `clip_skip` as an input.

    As in diffusers' `encode_prompt`, the output is the layer before the skipped ones, after the final norm. With
    `penultimate` it is the layer before that, without the norm.
    """
    layers = model.config.num_hidden_layers
    pooled = hasattr(model, "text_projection")
    text_model: Model = getattr(model, "text_model", model)

    def run(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        answer = model(tensors["input_ids"], output_hidden_states=True)
        states = torch.stack(answer.hidden_states, dim=1)
        # onnxscript has no translation of a number minus a tensor.
        index = (-tensors["clip_skip"] + layers - int(penultimate))[:, :, None, None]
        chosen = states.gather(1, index.expand(-1, -1, *states.shape[2:])).squeeze(1)
        if not penultimate:
            chosen = text_model.final_layer_norm(chosen)
        return (chosen, answer.text_embeds) if pooled else (chosen,)

    outputs: dict[str, tuple[int | str, ...]] = {"hidden_states": ("batch", length, model.config.hidden_size)}
    if pooled:
        outputs["text_embeds"] = ("batch", model.config.projection_dim)
    return Graph(
        name=name,
        module=model,
        run=run,
        inputs=(
            Input(name="input_ids", shape=("batch", length), values="index", below=model.config.vocab_size),
            Input(name="clip_skip", shape=("batch", 1), values="index", below=layers - int(penultimate)),
        ),
        outputs=outputs,
        checks=({"batch": 1}, {"batch": 2}),
    )


def image_encoder(name: str, model: Model) -> Graph:
    """Build the graph of a CLIP image encoder: the projected embedding and the penultimate hidden states."""
    config = model.config
    size, patches = config.image_size, (config.image_size // config.patch_size) ** 2

    def run(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        answer = model(tensors["pixel_values"], output_hidden_states=True)
        return answer.image_embeds, answer.hidden_states[-2]

    return Graph(
        name=f"image_encoder_{name}",
        module=model,
        run=run,
        inputs=(Input(name="pixel_values", shape=("batch", 3, size, size)),),
        outputs={
            "image_embeds": ("batch", config.projection_dim),
            "hidden_states": ("batch", patches + 1, config.hidden_size),
        },
        checks=({"batch": 1}, {"batch": 2}),
    )


def vae_encoder(vae: Model, factor: int, precisions: Precisions = AS_ENGINE) -> Graph:
    """Build the graph from pictures (-1 to 1) to the mean and log-variance of their latents (not scaled)."""
    channels = vae.config.latent_channels

    def run(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        distribution = vae.encode(tensors["sample"]).latent_dist
        return (distribution.parameters,)

    return Graph(
        name="vae_encoder",
        module=vae,
        run=run,
        inputs=(Input(name="sample", shape=("batch", 3, "height", "width")),),
        outputs={"moments": ("batch", 2 * channels, "h", "w")},
        precisions=precisions,
        checks=(
            {"batch": 1, "height": 8 * factor, "width": 8 * factor},
            {"batch": 2, "height": 8 * factor, "width": 12 * factor},
        ),
        tolerance=1e-3,
    )


def vae_decoder(vae: Model, precisions: Precisions = AS_ENGINE) -> Graph:
    """Build the graph from scaled latents to uint8 pictures [B, height, width, 3].

    Pixels are rounded as in diffusers' `VaeImageProcessor`. `finite` [B, 1] is false for pictures with infinities or
    NaN, which uint8 would hide.
    """
    config = vae.config
    # Some VAEs define a mean and a deviation of their latents; as buffers they move between devices with the weights.
    for buffer, key in EXACT_BUFFERS.items():
        if config.get(key) is not None:
            vae.register_buffer(buffer, torch.tensor(config[key]).view(1, -1, 1, 1), persistent=False)
    buffers = dict(vae.named_buffers(recurse=False))

    def run(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        latents = tensors["latents"]
        if "std_of_latents" in buffers:
            latents = latents * vae.std_of_latents
        latents = latents / config.scaling_factor
        if "mean_of_latents" in buffers:
            latents = latents + vae.mean_of_latents
        picture = vae.decode(latents.to(vae.dtype)).sample.float()
        levels = ((picture * 0.5 + 0.5).clamp(0, 1) * 255).round()
        # A decoder in int8 would clamp latents that are not finite.
        finite = torch.logical_and(_finite(picture), _finite(tensors["latents"]))
        return levels.permute(0, 2, 3, 1).to(torch.uint8), finite

    return Graph(
        name="vae_decoder",
        module=vae,
        run=run,
        inputs=(Input(name="latents", shape=("batch", config.latent_channels, "h", "w"), exact=True),),
        outputs={"images": ("batch", "height", "width", 3), "finite": ("batch", 1)},
        output_dtypes={"images": "UINT8", "finite": "BOOL"},
        precisions=precisions,
        checks=({"batch": 1, "h": 8, "w": 8}, {"batch": 2, "h": 8, "w": 12}),
        tolerance=1.0,
    )


def _finite(tensor: Tensor) -> Tensor:
    """Return for each row of `tensor` whether all its values are finite, bool [B, 1]."""
    return torch.isfinite(tensor).flatten(1).all(dim=1, keepdim=True)


def image_projection(adapter: str, layer: Model, embeds: dict[str, tuple[int, ...]]) -> Graph:
    """Build the graph from the embeddings of pictures to their image tokens [n, T, D].

    FaceID plus has two inputs: the face embedding, and CLIP hidden states, which diffusers passes as an attribute.
    """

    def run(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        if "clip_embeds" in tensors:
            layer.clip_embeds = tensors["clip_embeds"][:, None]
        return (layer(tensors["image_embeds"]),)

    return Graph(
        name=f"image_projection_{adapter}",
        module=layer,
        run=run,
        inputs=tuple(Input(name=name, shape=("images", *shape)) for name, shape in embeds.items()),
        outputs={"tokens": ("images", "tokens", "features")},
        checks=({"images": 1}, {"images": 3}),
    )


def safety_checker(model: Model) -> Graph:
    """Build the graph that flags unsafe pictures, with the rounding of `StableDiffusionSafetyChecker.forward`."""

    def above(embeds: Tensor, concepts: Tensor, thresholds: Tensor, adjustment: Tensor | float) -> Tensor:
        cosine = nn.functional.normalize(embeds) @ nn.functional.normalize(concepts).t()
        return ((cosine - thresholds + adjustment) * 1000).round() > 0

    def run(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        embeds = model.visual_projection(model.vision_model(tensors["pixel_values"])[1])
        special = above(embeds, model.special_care_embeds, model.special_care_embeds_weights, 0.0)
        adjustment = special.any(dim=1, keepdim=True) * 0.01
        unsafe = above(embeds, model.concept_embeds, model.concept_embeds_weights, adjustment)
        return (unsafe.any(dim=1, keepdim=True),)

    size = model.config.vision_config.image_size
    return Graph(
        name="safety_checker",
        module=model,
        run=run,
        inputs=(Input(name="pixel_values", shape=("batch", 3, size, size)),),
        outputs={"nsfw": ("batch", 1)},
        output_dtypes={"nsfw": "BOOL"},
        precisions=FULL,  # it is small, and a rounding error could change the result
        checks=({"batch": 1}, {"batch": 3}),
    )


def added_conditions(model: Model) -> dict[str, int]:
    """Return the inputs that a network takes besides the text, with their sizes."""
    if model.config.addition_embed_type != "text_time":
        return {}
    size, each = model.add_embedding.linear_1.in_features, model.config.addition_time_embed_dim
    # Original size, crop, and target size. The refiner has one score in place of the target size; it is the only one
    # whose pooled embedding is as wide as its text, because a single encoder makes both.
    time_ids = 5 if size - 5 * each == model.config.cross_attention_dim else 6
    return {"text_embeds": size - time_ids * each, "time_ids": time_ids}


def added_input(name: str, size: int) -> Input:
    """Declare one of `added_conditions`; `time_ids` are pixels that go through sines and so need all of float32."""
    return Input(name=name, shape=("batch", size), exact=name == "time_ids")


def level_axes(level: int) -> tuple[str, str]:
    """Return the names of the latent axes after halving their size `level` times."""
    return ("h", "w") if level == 0 else (f"h{level}", f"w{level}")


def level_sizes(shapes: Iterable[Residual], h: int, w: int) -> Axes:
    """Return the sizes of these axes at the levels of `shapes`, for latents of `h` x `w`."""
    levels = {0, *(shape.level for shape in shapes)}
    return {axis: level_size(size, i) for i in levels for axis, size in zip(level_axes(i), (h, w), strict=True)}


def unet(
    model: Model,
    adapters: list[str],
    residuals: Sequence[Residual] = (),
    features: Sequence[Residual] = (),
    *,
    frames: bool = False,
) -> Graph:
    """Build the graph of the UNet of one denoising step, with image prompts (see `image_prompt`) as inputs.

    Args:
        model: a diffusers UNet; changed in place.
        adapters: the names of the IP-Adapters.
        residuals: what ControlNets add; these are inputs too.
        features: what T2I-Adapters add; these are inputs too.
        frames: whether `model` is a motion UNet. A row is then a clip: `sample` has an axis of frames after the
            channels; residuals, image tokens, and masks have one after the batch; and text applies to all frames.
    """
    config = model.config
    prompts = image_prompt.install(model)
    layers = image_prompt.cross_attention_layers(model)
    levels = sorted({layer.level for layer in layers})
    # With more upsamplers than any size has factors of two, every upsampling takes its size from the skip connection.
    # So one graph also serves sizes that are not multiples of 64 pixels (UNet2DConditionModel.forward).
    model.num_upsamplers = 30
    clip = ("frames",) if frames else ()

    inputs = [
        Input(name="sample", shape=("batch", config.in_channels, *clip, "h", "w")),
        Input(name="timestep", shape=("batch",), values="timestep", exact=True),
        Input(name="encoder_hidden_states", shape=("batch", "text", config.cross_attention_dim)),
    ]
    added = added_conditions(model)
    inputs += [added_input(name, size) for name, size in added.items()]
    if config.time_cond_proj_dim is not None:
        inputs.append(Input(name="timestep_cond", shape=("batch", config.time_cond_proj_dim)))
    for name in adapters:
        groups, tokens = f"groups_{name}", f"tokens_{name}"
        by_frame = ("batch", *clip, groups)
        inputs += [
            Input(name=tensor_names.ip_tokens(name), shape=(*by_frame, tokens, config.cross_attention_dim)),
            Input(name=tensor_names.ip_bias(name), shape=("batch", groups, tokens), values="bias"),
            Input(name=tensor_names.ip_scale(name), shape=("batch", groups, len(layers)), values="scale"),
            *(Input(name=tensor_names.ip_mask(name, i), shape=(*by_frame, f"q{i}"), values="unit") for i in levels),
        ]
    control = residual_names(len(residuals)) if residuals else ()
    for name, shape in zip(control, residuals, strict=True):
        inputs.append(Input(name=name, shape=("batch", *clip, shape.channels, *level_axes(shape.level))))

    intrablock = feature_names(len(features))
    for name, shape in zip(intrablock, features, strict=True):
        inputs.append(Input(name=name, shape=("batch", shape.channels, *level_axes(shape.level))))

    def run(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        if frames:
            tensors = _by_frame(tensors, control)
        prompts.adapters = [
            image_prompt.AdapterPrompts.of(
                tokens=tensors[tensor_names.ip_tokens(name)],
                bias=tensors[tensor_names.ip_bias(name)],
                scale=tensors[tensor_names.ip_scale(name)],
                masks={i: tensors[tensor_names.ip_mask(name, i)] for i in levels},
            )
            for name in adapters
        ]
        sample, timestep, text = (tensors[name] for name in ("sample", "timestep", "encoder_hidden_states"))
        down = [tensors[name] for name in control]
        middle = down.pop() if down else None
        return model(
            sample,
            timestep,
            text,
            timestep_cond=tensors.get("timestep_cond"),
            added_cond_kwargs={name: tensors[name] for name in added},
            down_block_additional_residuals=tuple(down) or None,
            mid_block_additional_residual=middle,
            return_dict=False,
            **({"down_intrablock_additional_residuals": [tensors[name] for name in intrablock]} if features else {}),
        )

    def axes(batch: int, h: int, w: int, groups: int, tokens: int, scale: float) -> Axes:
        resolutions = {f"q{i}": level_size(h, i) * level_size(w, i) for i in levels}
        counts = {f"groups_{name}": groups for name in adapters} | {f"tokens_{name}": tokens for name in adapters}
        sizes = level_sizes((*residuals, *features), h, w) | ({"frames": 2 * batch} if frames else {})
        return {"batch": batch, "text": 77, "scale": scale} | counts | resolutions | sizes

    return Graph(
        name="motion_unet" if frames else "unet",
        module=model,
        run=run,
        inputs=tuple(inputs),
        outputs={"noise_pred": ("batch", config.out_channels, *clip, "h", "w")},
        precisions=AS_ENGINE if frames else WITH_FP8,
        internal=frozenset((*control, *intrablock)),
        checks=(axes(2, 8, 8, 1, 4, scale=0.0), axes(3, 9, 12, 2, 16, scale=0.8)),
        tolerance=1e-3,
    )


def _by_frame(tensors: dict[str, Tensor], residuals: Iterable[str]) -> dict[str, Tensor]:
    """Bring prompts and residuals to one row per frame, as the attention layers of a motion UNet expect."""
    count = tensors["sample"].shape[2]
    repeated = {
        name: tensor[:, None].expand(-1, count, *tensor.shape[1:]).flatten(0, 1)
        for name, tensor in tensors.items()
        if name.startswith(("ip_bias", "ip_scale", "encoder_hidden_states"))
    }
    names = [name for name in tensors if name.startswith(("ip_tokens", "ip_mask"))]
    return tensors | repeated | {name: tensors[name].flatten(0, 1) for name in (*names, *residuals)}
