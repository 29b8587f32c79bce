"""Autoencoders whose activations overflow in fp16."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from imprompt_export import graphs
from imprompt_export.fp16_vae import fit_fp16_range
from imprompt_export.precision import cast
from tiny import base

Vae = Any


@pytest.fixture(scope="module")
def vae() -> Vae:
    """A random VAE with a residual stream as large as that of SDXL's: beyond 65,504."""
    made = base._vae(2, scaling_factor=0.13025)
    with torch.no_grad():
        for network in (made.encoder, made.decoder):
            for name, layer in network.named_modules():
                if name.endswith(("conv2", "conv_in", "to_out.0")):
                    layer.weight.mul_(1e4)
                    layer.bias.mul_(1e4)
    return made


@torch.no_grad()
def outputs(vae: Vae, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels of decoded pictures, and moments of an encoded one."""
    vae = copy.deepcopy(vae).to(dtype)
    latents = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    pictures = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(2)) * 2 - 1
    decoded, moments = vae.decode(latents.to(dtype)).sample, vae.encode(pictures.to(dtype)).latent_dist.parameters
    return (decoded.float() / 2 + 0.5).clamp(0, 1) * 255, moments.float()


def test_a_fitted_vae_computes_the_same_in_float32(vae: Vae) -> None:
    fitted = copy.deepcopy(vae)
    assert fit_fp16_range(fitted)
    assert not torch.equal(fitted.decoder.conv_in.weight, vae.decoder.conv_in.weight)
    for expected, answer in zip(outputs(vae), outputs(fitted), strict=True):
        assert torch.equal(expected, answer)


def test_a_fitted_vae_gives_the_same_picture_in_fp16(vae: Vae) -> None:
    fitted = copy.deepcopy(vae)
    fit_fp16_range(fitted)
    assert not outputs(vae, torch.float16)[0].isfinite().all()
    (levels, moments), (expected, expected_moments) = outputs(fitted, torch.float16), outputs(vae)
    assert (levels - expected).abs().max() <= 2
    assert expected.std() > 10
    assert (moments - expected_moments).abs().max() <= 0.02 * expected_moments.abs().max()


def test_a_vae_within_range_stays_as_it_is() -> None:
    vae = base._vae(1, scaling_factor=0.18215)
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    assert fit_fp16_range(vae)
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())


def test_the_mean_of_latents_is_not_rounded() -> None:
    vae = base._vae(1, scaling_factor=0.13025)
    vae.register_to_config(latents_mean=[0.1] * 4, latents_std=[0.3] * 4)
    graph = graphs.vae_decoder(vae)
    with cast(vae, torch.float16):
        assert vae.mean_of_latents.dtype == vae.std_of_latents.dtype == torch.float32
        assert vae.decoder.conv_in.weight.dtype == torch.float16
    example = graph.example(graph.checks[0])
    pictures, finite = graph.run(example)
    with torch.no_grad():
        expected = vae.decode(example["latents"] * 0.3 / 0.13025 + 0.1).sample
    assert finite.all()
    assert (pictures.permute(0, 3, 1, 2) - (expected / 2 + 0.5).clamp(0, 1) * 255).abs().max() <= 0.51


def test_other_autoencoders_are_left_alone() -> None:
    vae = base._vae(1, scaling_factor=0.18215)
    vae.decoder.conv_norm_out = torch.nn.BatchNorm2d(16)
    assert not fit_fp16_range(vae)
