"""The networks of a preset with random weights, made on the device, and what they are called with."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from imprompt_bench.checkpoints import ADAPTER, SCHEDULER, TOKENS
from imprompt_bench.presets import Preset
from imprompt_bench.rig import PREVIEW
from imprompt_export import graphs
from imprompt_export.graphs import Graph
from imprompt_export.image_prompt import cross_attention_layers
from imprompt_export.precision import Positional
from imprompt_serving import tensor_names
from imprompt_serving.specs import Adapter, Bundle, Range, Shapes, TextEncoder, level_size

TEXT_LENGTH, FACTOR, LATENT_CHANNELS = 77, 8, 4
SCALE = 0.6
_TIME_IDS = 6
_ROOF_EDGE = {"cuda": 8192, "cpu": 512}
"""Edge of the square matrices whose product is the roof; large enough to fill the device."""

Tensors = dict[str, Tensor]


class Networks:
    """A UNet with the plain adapter in it, as diffusers' `load_ip_adapter` leaves it, and a VAE on the CPU."""

    def __init__(self, preset: Preset, device: str) -> None:
        self.preset, self.device = preset, device
        torch.manual_seed(0)
        self.unet = _unet(preset, device)
        self.layers = tuple(cross_attention_layers(self.unet))
        self.size = preset.size

    @cached_property
    def vae(self) -> Any:
        torch.manual_seed(0)
        return AutoencoderKL(latent_channels=LATENT_CHANNELS, **self.preset.vae).eval().requires_grad_(False)

    def graph(self) -> Graph:
        """The UNet as engines are made of it; diffusers' attention processors are gone then."""
        return graphs.unet(self.unet, [ADAPTER])

    def bundle(self, rows: int, precision: str) -> Bundle:
        """What the denoiser knows of these networks, for pictures of one size and calls of up to `rows` rows."""
        preset, unet, size = self.preset, self.unet, Range(self.size, self.size, self.size)
        widths = [config["hidden_size"] for config in preset.text]
        return Bundle(
            name="bench",
            family=preset.family,
            latent_channels=LATENT_CHANNELS,
            unet_channels=unet.config.in_channels,
            vae_scale_factor=FACTOR,
            vae_scaling_factor=preset.vae["scaling_factor"],
            preview_factors=PREVIEW,
            default_height=self.size,
            default_width=self.size,
            scheduler="EulerDiscreteScheduler",
            scheduler_config=SCHEDULER,
            text_encoders=tuple(
                TextEncoder(engine="text_encoder", max_length=TEXT_LENGTH, pad_token_id=0, hidden_size=width)
                for width in widths
            ),
            max_clip_skip=0,
            pooled_size=widths[-1] if preset.family == "sdxl" else None,
            layers=self.layers,
            transformer_per_block={
                "down": unet.config.layers_per_block,
                "up": unet.config.layers_per_block + 1,
            },
            adapters=(
                Adapter(
                    name=ADAPTER,
                    kind="plain",
                    num_tokens=TOKENS,
                    image_encoder="clip",
                    embed_shape=(preset.vision["projection_dim"],),
                ),
            ),
            shapes=Shapes(height=size, width=size, rows=Range(1, 2, rows), regions=1),
            backend="inductor",
            precision=precision,
        )

    def inputs(self, rows: int) -> Tensors:
        """Inputs of the UNet on the device, as a request without region masks has them; and the image embeddings."""
        side, config = self.size // FACTOR, self.unet.config
        tensors = _drawn(rows, side, config, self.preset.vision["projection_dim"], "cpu")
        levels = sorted({layer.level for layer in self.layers})
        tensors[tensor_names.ip_bias(ADAPTER)] = torch.zeros(rows, 1, TOKENS)
        tensors[tensor_names.ip_scale(ADAPTER)] = torch.full((rows, 1, len(self.layers)), SCALE)
        for level in levels:
            tensors[tensor_names.ip_mask(ADAPTER, level)] = torch.ones(rows, 1, level_size(side, level) ** 2)
        placed = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        projection = self.unet.encoder_hid_proj.image_projection_layers[0]
        with torch.no_grad():
            embeds = placed["image_embeds"].to(next(projection.parameters()).dtype)
            placed[tensor_names.ip_tokens(ADAPTER)] = projection(embeds)[:, None].float()
        return placed


def positional(graph: Graph, tensors: Tensors) -> tuple[Tensor, ...]:
    """`graph` in float32, convolutions too, which cuDNN would compute in TF32."""
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        answer: tuple[Tensor, ...] = Positional(graph)(*(tensors[spec.name] for spec in graph.inputs))
        return answer


def run_diffusers(unet: Any, tensors: Tensors, dtype: torch.dtype) -> Tensor:
    """A call of diffusers' own UNet, which projects the image embeddings, too."""
    added: dict[str, Any] = {n: tensors[n].to(dtype) for n in ("text_embeds", "time_ids") if n in tensors}
    added["image_embeds"] = [tensors["image_embeds"].to(dtype)[:, None]]
    sample, text = tensors["sample"].to(dtype), tensors["encoder_hidden_states"].to(dtype)
    answer: Tensor = unet(sample, tensors["timestep"], text, added_cond_kwargs=added, return_dict=False)[0]
    return answer.float()


def unet_flop(preset: Preset, rows: int) -> float:
    """Floating-point operations of a call with `rows` rows; torch counts them without computing anything."""
    unet = _unet(preset, "meta")
    drawn = _drawn(rows, preset.size // FACTOR, unet.config, preset.vision["projection_dim"], "meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run_diffusers(unet, drawn, torch.float32)
    return float(counter.get_total_flops())


def roof(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, here and now."""
    from gpu.timing import device_seconds

    edge = _ROOF_EDGE[device]
    a, b = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))
    seconds = sorted(device_seconds(lambda: a @ b, device, 10))
    return 2 * edge**3 / seconds[len(seconds) // 2]


def _unet(preset: Preset, device: str) -> Any:
    with torch.device(device):
        unet: Any = UNet2DConditionModel(**preset.unet)
        width = unet.config.cross_attention_dim
        processors = dict(unet.attn_processors)
        for layer in cross_attention_layers(unet):
            hidden = unet.get_submodule(layer.name).to_q.out_features
            processors[f"{layer.name}.processor"] = IPAdapterAttnProcessor2_0(hidden, width, (TOKENS,), scale=SCALE)
        unet.set_attn_processor(processors)
        projection = ImageProjection(preset.vision["projection_dim"], width, TOKENS)
        unet.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    unet.config.encoder_hid_dim_type = "ip_image_proj"
    return unet.eval().requires_grad_(False)


def _drawn(rows: int, side: int, config: Any, features: int, device: str) -> Tensors:
    generator = None if device == "meta" else torch.Generator(device).manual_seed(rows)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    tensors = {
        "sample": randn(rows, config.in_channels, side, side),
        "timestep": torch.full((rows,), 500.0, device=device),
        "encoder_hidden_states": randn(rows, TEXT_LENGTH, config.cross_attention_dim),
        "image_embeds": randn(rows, features),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - _TIME_IDS * config.addition_time_embed_dim
        pixels = FACTOR * side
        tensors["text_embeds"] = randn(rows, pooled)
        tensors["time_ids"] = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]], device=device).float()
        tensors["time_ids"] = tensors["time_ids"].repeat(rows, 1)
    return tensors
