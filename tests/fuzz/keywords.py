"""Requests as keyword arguments of the SDK, and odd Python values to put in their place."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from fuzz import pictures, schedulers, values
from fuzz.target import Target
from fuzz.valid import Values

_UNKNOWN = (
    "nonsense",
    "generator",
    "callback_on_step_end",
    "num_inference_step",
    "timesteps",
    "__class__",
    "ip_adapter",
)
_WORDS = (
    "",
    "a",
    "plain",
    "canny",
    "latent",
    "pil",
    "np",
    "png",
    "x" * 300,
    "\ud83d",
    "\0",
    "DDIMScheduler",
    "/etc/passwd",
)

_ODD: tuple[Callable[[], Any], ...] = (
    *(object, dict, list, tuple, set, bytes, Path, Image.Image, io.BytesIO),
    *(
        lambda: 10**5_000,
        lambda: -(2**63) - 1,
        lambda: 2**64,
        lambda: 1e308,
        lambda: float("nan"),
        lambda: float("inf"),
    ),
    *(lambda: True, lambda: False, lambda: 1, lambda: 0, lambda: -1, lambda: 2.5, lambda: 1j, lambda: "1"),
    *(
        lambda: Decimal("NaN"),
        lambda: Fraction(1, 3),
        lambda: range(3),
        lambda: iter("ab"),
        lambda: print,
        lambda: type,
    ),
    *(lambda: [None], lambda: [[]], lambda: [[[1]]], lambda: {"0": "a"}, lambda: {"plain": None}, lambda: {1: 2}),
    *(lambda: ["a", 1], lambda: [1, "a"], lambda: [0.1] * 100, lambda: b"\xff\xfe", lambda: Path("/nonexistent.png")),
    *(lambda: np.float64(0.5), lambda: np.int64(1), lambda: np.array(1), lambda: np.array("a"), lambda: np.zeros(0)),
    *(lambda: np.zeros((8, 8)), lambda: np.zeros((8, 8, 3), np.uint8), lambda: np.zeros((0, 0, 3), np.uint8)),
    *(lambda: np.zeros((8, 8, 3), np.float32), lambda: np.array([None]), lambda: np.zeros((1, 2, 8, 8), np.complex64)),
    *(lambda: np.zeros((2, 1, 128), np.float16), lambda: np.full((2, 1, 4), np.nan), lambda: np.ma.masked_all((8, 8))),
)
_MODES = (*pictures.MODES, "LAB", "PA", "RGBX", "I;16B")


def as_keywords(given: Values, target: Target) -> dict[str, Any]:
    """Convert tensor values to SDK keywords: pictures keyed by adapter, single values unwrapped, JSON parsed."""
    keywords: dict[str, Any] = {}
    embeds, scales = "ip_adapter_image_embeds", "ip_adapter_scale_config"
    for name, value in given.items():
        declared = target.pipeline.input(name)
        if name.endswith("_adapter"):
            continue
        if f"{name}_adapter" in given:
            keywords[name] = {given[f"{name}_adapter"][0]: list(value)}
        elif name.startswith(f"{embeds}_"):
            keywords[embeds] = {name.removeprefix(f"{embeds}_"): value}
        elif name.endswith("_config"):
            keywords["ip_adapter_scale" if name == scales else name] = json.loads(value[0])
        elif declared is not None and declared.dims == (1,):
            keywords[name] = value[0]
        else:
            keywords[name] = value[0] if len(value) == 1 else list(value)
    return keywords


def corrupt(rng: Random, target: Target, keywords: dict[str, Any]) -> None:
    """Set one to three values of any type in `keywords`, under known or unknown names."""
    known = sorted(_known(target))
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice(sorted(keywords)) if rng.random() < 0.5 else rng.choice((*known, *_UNKNOWN))
        keywords[name] = odd_value(rng, target)


def odd_value(rng: Random, target: Target) -> Any:
    """Draw a Python value that is valid for few parameters, if any."""
    match rng.randrange(8):
        case 0:
            return _picture(rng)
        case 1:
            return [_picture(rng) for _ in range(rng.randrange(4))]
        case 2:
            names = [*(str(adapter["name"]) for adapter in target.adapters), "nonsense"]
            return {rng.choice(names): rng.choice(_ODD)()}
        case 3:
            return rng.choice(_WORDS)
        case 4:
            return values.json_value(rng)
        case 5:
            return schedulers.config(rng, rng.choice(target.capabilities["schedulers"]))
        case _:
            return rng.choice(_ODD)()


def _picture(rng: Random) -> Any:
    """Draw a picture of a type that the SDK accepts, but perhaps of an invalid mode or size."""
    size = rng.choice(((8, 8), (64, 64), (1, 1), (0, 0), (0, 5), (300, 2)))
    match rng.randrange(3):
        case 0:
            return pictures.picture(rng)
        case 1:
            return Image.new(rng.choice(_MODES), size)
        case _:
            return np.zeros((*reversed(size), rng.choice((1, 2, 3, 4))), rng.choice((np.uint8, np.int32, np.float64)))


def _known(target: Target) -> set[str]:
    """List the keywords of `generate` and `stream` for this bundle."""
    names = {declared.name for declared in (*target.pipeline.inputs, *target.stream.inputs)}
    return (names | {"ip_adapter_image_embeds", "output_type", "timeout"}) - {"prompt"}
