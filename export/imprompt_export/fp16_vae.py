"""Fit an autoencoder into the range of fp16 without changing its results.

SDXL's VAE overflows in fp16: its residual stream grows beyond 65,504, which is why diffusers runs it in float32
(`force_upcast`). Every layer that reads the stream is a group norm or linear, so the stream can be scaled by a power of
two: the picture in float32 stays exactly the same, and all values fit fp16.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

LARGEST = torch.finfo(torch.float16).max / 16
"""Largest activation to aim for. Real pictures may exceed the examples, hence a margin of 16."""
_EXAMPLE_LATENTS = (24, 24)


def fit_fp16_range(vae: Any) -> bool:
    """Scale the residual streams of the encoder and the decoder so that fp16 holds every activation.

    Args:
        vae: an `AutoencoderKL`; changed in place. In float32 its results stay the same to the bit.

    Returns:
        Whether that is possible. False, with nothing changed, for an autoencoder with unknown blocks.
    """
    if not all(_is_known(network) for network in (vae.encoder, vae.decoder)):
        return False
    for network, largest in _largest_activations(vae).items():
        if largest > LARGEST:
            _scale(network, 2.0 ** -math.ceil(math.log2(largest / LARGEST)))
    return True


def _is_known(network: nn.Module) -> bool:
    """Return whether `_scale` knows the block of every layer with weights, and every norm is a group norm."""
    blocks = [m for m in network.modules() if isinstance(m, ResnetBlock2D | Attention | Upsample2D | Downsample2D)]
    known = {network.conv_in, network.conv_norm_out, network.conv_out}.union(*(block.modules() for block in blocks))
    norms = [network.conv_norm_out]
    for block in blocks:
        norms += [getattr(block, name) for name in ("norm1", "norm2", "group_norm") if hasattr(block, name)]
    with_weights = {module for module in network.modules() if list(module.parameters(recurse=False))}
    return with_weights <= known and all(isinstance(norm, nn.GroupNorm) for norm in norms)


@torch.no_grad()
def _largest_activations(vae: Any) -> dict[nn.Module, float]:
    """Return the largest layer output of the encoder and of the decoder, over noise and its reconstruction."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, vae.config.latent_channels, *_EXAMPLE_LATENTS, generator=generator)
    with _recorded(vae.decoder) as decoder, _recorded(vae.encoder) as encoder:
        picture = vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)
        for example in (picture, torch.rand(picture.shape, generator=generator) * 2 - 1):
            vae.decode(vae.encode(example).latent_dist.mean)
    return {vae.encoder: max(encoder), vae.decoder: max(decoder)}


@contextlib.contextmanager
def _recorded(network: nn.Module) -> Iterator[list[float]]:
    """Record the largest absolute value of each layer's output while the context is open."""
    found: list[float] = []
    # Include blocks, because the sum of two layers may be larger than either.
    handles = [
        module.register_forward_hook(lambda _module, _inputs, output: found.append(float(output.abs().max())))
        for module in network.modules()
        if isinstance(module, nn.Conv2d | nn.Linear | ResnetBlock2D | Attention)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _scale(network: Any, factor: float) -> None:
    """Multiply the residual stream of an encoder or decoder, and the activations inside its resnets, by `factor`."""
    _scale_layer(network.conv_in, factor)
    _scale_norm(network.conv_norm_out, factor)
    for module in network.modules():
        match module:
            case ResnetBlock2D():
                _scale_norm(module.norm1, factor)
                _scale_layer(module.conv1, factor)
                _scale_norm(module.norm2, factor)
                _scale_layer(module.conv2, factor)
                if module.conv_shortcut is not None:
                    _scale_bias(module.conv_shortcut, factor)
            case Attention():
                _scale_norm(module.group_norm, factor)
                _scale_layer(module.to_out[0], factor)
            case Upsample2D() | Downsample2D() if module.conv is not None:
                _scale_bias(module.conv, factor)


def _scale_layer(layer: Any, factor: float) -> None:
    """Scale a layer that reads normalized values and writes to the stream."""
    layer.weight.mul_(factor)
    _scale_bias(layer, factor)


def _scale_bias(layer: Any, factor: float) -> None:
    """Scale a layer that reads the stream itself: only its bias."""
    if layer.bias is not None:
        layer.bias.mul_(factor)


def _scale_norm(norm: Any, factor: float) -> None:
    """Scale a norm that reads the stream: its epsilon, as the variance changes by the square."""
    norm.eps *= factor**2
