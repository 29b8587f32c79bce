"""Parse the scheduler of a request: its class, and its configuration as far as it can be checked without diffusers."""

from __future__ import annotations

import math
from typing import Any

from imprompt_serving.errors import InvalidRequest, shown
from imprompt_serving.pipeline.reader import Reader
from imprompt_serving.scheduler_names import SCHEDULERS
from imprompt_serving.specs import Limits

_CLASS, _DEFAULTS, _SEED = "_class_name", "_use_default_values", "noise_sampler_seed"
_MAX_SOLVER_ORDER = 8
"""A solver keeps as many UNet outputs as its order. diffusers recommends 2 or 3."""


def parse_scheduler(read: Reader, limits: Limits) -> tuple[str | None, dict[str, Any]]:
    """Parse class name and configuration of the scheduler.

    A configuration with diffusers' private keys is complete; otherwise it overrides single values. A complete one keeps
    `_use_default_values`, the keys that diffusers sets to the defaults of the class. Infinite values become the strings
    `inf` and `-inf`, which JSON can represent.
    """
    name, parameter = read.choice("scheduler"), "scheduler_config"
    config = read.json(parameter) if parameter in read else {}
    if not isinstance(config, dict):
        raise InvalidRequest(parameter, f"must be a JSON object, got {shown(config)}")
    private = {key: value for key, value in config.items() if key.startswith("_")}
    values = {key: _checked(key, value, limits) for key, value in config.items() if key not in private}
    if not {_CLASS, _DEFAULTS} & private.keys():
        return name, values
    unset = private.get(_DEFAULTS, [])
    if not isinstance(unset, list) or not all(isinstance(key, str) for key in unset):
        raise InvalidRequest(parameter, f"{_DEFAULTS} must be a list of names, got {shown(unset)}")
    kind = private.get(_CLASS)
    if name is None and kind is not None and kind not in SCHEDULERS:
        problem = f"{_CLASS} {shown(kind)} is not supported; choose one of {', '.join(SCHEDULERS)}"
        raise InvalidRequest(parameter, problem)
    return name or kind, values | {_DEFAULTS: unset}


def _checked(key: str, value: Any, limits: Limits) -> Any:
    """Check a value against the limits. Whether the scheduler accepts it is only known in the denoiser."""
    if key == _SEED:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise InvalidRequest("scheduler_config", f"{key} must be an integer, got {shown(value)}")
        return value
    if isinstance(value, dict):
        raise InvalidRequest("scheduler_config", f"{key} cannot be an object")
    if isinstance(value, list):
        if len(value) > limits.train_timesteps:
            raise InvalidRequest("scheduler_config", f"{key} takes at most {limits.train_timesteps} values")
        if any(isinstance(part, dict | list) or part in (math.inf, -math.inf) for part in value):
            raise InvalidRequest("scheduler_config", f"{key} must be a flat list of finite values")
        return [_checked(key, part, limits) for part in value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if math.isinf(value):
        return str(value)
    if not abs(value) <= limits.train_timesteps:
        raise InvalidRequest("scheduler_config", f"{key} must be at most {limits.train_timesteps}, got {shown(value)}")
    if key == "solver_order" and not 1 <= value <= _MAX_SOLVER_ORDER:
        raise InvalidRequest("scheduler_config", f"{key} must be 1 to {_MAX_SOLVER_ORDER}, got {shown(value)}")
    return value
