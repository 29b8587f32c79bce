"""Seeded random weights, scaled so that random networks respond strongly to their inputs.

A network with PyTorch's default initialization hardly responds to its inputs: residual branches are weak, and attention
is close to a plain average. Here every weight is drawn with a gain for its role, so that tests fail loudly if two
prompts, pictures or scales are mixed up.
"""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)

# The first match applies. A gain is the standard deviation of the layer's output for inputs of unit variance.
GAINS: tuple[tuple[str, float], ...] = (
    (r"(to_q|to_k|q_proj|k_proj|query|key)\.weight$", 1.4),
    (r"(to_q|to_k)_ip\.weight$", 1.4),
    (r"attn2\.to_v\.weight$", 1.5),
    (r"attn2\.to_out\.0\.weight$", 1.5),
    (r"token_embedding\.weight$", 1.0),
    (r"position_embedding\.weight$", 0.5),
)


@contextmanager
def private_rng() -> Iterator[None]:
    """Let code draw from the global generator (as model constructors do), and restore its state afterwards."""
    with torch.random.fork_rng(devices=[]):
        yield


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def normal(rng: torch.Generator, *shape: int, std: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=rng) * std


def linear(rng: torch.Generator, out_features: int, in_features: int, gain: float = 1.0) -> torch.Tensor:
    """Draw a weight matrix whose output has standard deviation `gain` for inputs of unit variance."""
    return normal(rng, out_features, in_features, std=gain / math.sqrt(in_features))


@torch.no_grad()
def randomize(model: Model, seed: int, gains: tuple[tuple[str, float], ...] = ()) -> Model:
    """Redraw every parameter, in alphabetical order. `gains` take precedence over the common ones."""
    rng = generator(seed)
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm | nn.GroupNorm)}
    for name, parameter in sorted(model.named_parameters()):
        if name.rpartition(".")[0] in norms:
            noise = normal(rng, *parameter.shape, std=0.1)
            parameter.copy_(1 + noise if name.endswith("weight") else noise)
        elif parameter.dim() < 2:
            parameter.copy_(normal(rng, *parameter.shape, std=0.1))
        else:
            gain = next((gain for pattern, gain in (*gains, *GAINS) if re.search(pattern, name)), 1.0)
            fan_in = 1 if "embedding.weight" in name and parameter.dim() == 2 else parameter[0].numel()
            parameter.copy_(normal(rng, *parameter.shape, std=gain / math.sqrt(fan_in)))
    return model.eval()


@torch.no_grad()
def calibrate(layer: nn.Conv2d, output: Callable[[], torch.Tensor], std: float) -> None:
    """Rescale `layer`, the last of a network, so that `output()` [B, C, ...] has zero mean and deviation `std`."""
    values = output().transpose(0, 1).flatten(1)
    factor = std / values.std()
    layer.weight.mul_(factor)
    assert layer.bias is not None
    layer.bias.sub_(values.mean(1)).mul_(factor)
