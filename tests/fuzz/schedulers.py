"""Scheduler configurations with odd values for existing keys."""

from __future__ import annotations

import inspect
import json
from functools import lru_cache
from random import Random
from typing import Any

import diffusers

from fuzz.values import json_value

WORDS = (
    *("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "exp"),  # beta_schedule, time_shift_type
    *("epsilon", "sample", "v_prediction", "flow_prediction"),
    *("leading", "trailing", "linspace", "log_linear"),
    *(
        "dpmsolver",
        "dpmsolver++",
        "sde-dpmsolver",
        "sde-dpmsolver++",
        "deis",
        "midpoint",
        "heun",
        "bh1",
        "bh2",
        "logrho",
    ),
    *("zero", "sigma_min", "continuous", "discrete"),
    *("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"),
)
"""Values that some scheduler accepts for some key."""
_NUMBERS: tuple[Any, ...] = (
    0,
    1,
    2,
    3,
    4,
    5,
    10,
    -1,
    999,
    1000,
    10**5,
    10**6,
    3 * 10**7,
    2**31,
    10**30,
    0.1,
    0.5,
    1e-9,
)


@lru_cache(maxsize=64)
def keys(scheduler: str) -> tuple[str, ...]:
    """List the configuration keys of a diffusers scheduler."""
    parameters = inspect.signature(getattr(diffusers, scheduler).__init__).parameters
    return tuple(sorted(set(parameters) - {"self"}))


@lru_cache(maxsize=64)
def defaults(scheduler: str) -> dict[str, Any]:
    """Return the whole default configuration as diffusers stores it, including private keys and infinities."""
    return dict(getattr(diffusers, scheduler)().config)


def config(rng: Random, scheduler: str) -> dict[str, Any]:
    """Draw one to three keys with values of any type; now and then a private or unknown key, or all keys."""
    chosen: dict[str, Any] = {}
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        chosen[rng.choice(keys(scheduler))] = _value(rng)
    match rng.randrange(20):
        case 0:
            chosen[rng.choice(("x", "_class_name", "_diffusers_version", "self", "kwargs", ""))] = _value(rng)
        case 1:
            return defaults(scheduler) | chosen
    return chosen


def config_text(rng: Random, scheduler: str) -> bytes:
    """Draw such a configuration as JSON, with NaN and infinities in Python's spelling."""
    return json.dumps(config(rng, scheduler)).encode()


def _value(rng: Random) -> Any:
    match rng.randrange(6):
        case 0 | 1:
            return rng.choice(WORDS)
        case 2 | 3:
            return rng.choice(_NUMBERS)
        case 4:
            return [rng.choice((0.0, 0.1, 0.999, 1.0, -1.0, None, "a"))] * rng.choice((0, 1, 3, 1000))
        case _:
            return json_value(rng)
