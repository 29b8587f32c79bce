"""diffusers schedulers by class name; each job has its own, for they keep state."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import diffusers

from imprompt_serving.capabilities import SCHEDULERS
from imprompt_serving.errors import InvalidRequest
from imprompt_serving.job import JobRequest
from imprompt_serving.specs import Bundle


def make_scheduler(bundle: Bundle, request: JobRequest) -> Any:
    """The scheduler that diffusers' pipeline for ``request`` would have: the bundle's own as that pipeline corrects it,
    or one made from it with another class or single values replaced.

    Raises:
        InvalidRequest: unknown class, a key the class does not take, or a value that it refuses.
    """
    own = _make(bundle.scheduler, bundle.scheduler_config, {}, request.seeds[0])
    own.register_to_config(**_corrections(own.config, bundle, request))
    if request.scheduler is None and not request.scheduler_config:
        return own
    return _make(request.scheduler or bundle.scheduler, own.config, request.scheduler_config, request.seeds[0])


def _corrections(config: Mapping[str, Any], bundle: Bundle, request: JobRequest) -> dict[str, Any]:
    """What the pipelines of SD 1.5 change in an outdated configuration; those of ControlNets and clips do not."""
    if bundle.family != "sd15" or request.controls or request.frames is not None:
        return {}
    wrong = {"steps_offset": 1}
    wrong |= {"skip_prk_steps": True} if request.task == "inpainting" else {"clip_sample": False}
    return {name: value for name, value in wrong.items() if config.get(name, value) != value}


def _make(name: str, config: Mapping[str, Any], overrides: dict[str, Any], seed: int) -> Any:
    """A scheduler of class ``name`` from ``config``, with single values replaced."""
    if name not in SCHEDULERS:
        raise InvalidRequest("scheduler", f"unknown scheduler {name!r}; known are {', '.join(SCHEDULERS)}")
    kind = getattr(diffusers, name)
    parameters = set(inspect.signature(kind.__init__).parameters) - {"self"}
    unknown = sorted(set(overrides) - parameters)
    if unknown:
        raise InvalidRequest("scheduler_config", f"{name} has no {', '.join(unknown)}; it has {sorted(parameters)}")
    if "noise_sampler_seed" in parameters:
        # DPMSolverSDEScheduler draws its noise from a seed of its own, at random unless set.
        overrides = {"noise_sampler_seed": seed, **overrides}
    try:
        return copy.deepcopy(_made(json.dumps((name, config, overrides))))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise InvalidRequest("scheduler_config", f"{name} refuses it: {error}") from error


@lru_cache(maxsize=64)
def _made(key: str) -> Any:
    """A scheduler to copy, from its class, configuration and overrides as JSON: making one takes far longer."""
    name, config, overrides = json.loads(key)  # with the infinities of diffusers' defaults, which msgspec makes null
    return getattr(diffusers, name).from_config(config, **overrides)


def set_timesteps(scheduler: Any, steps: int) -> Any:
    """Timesteps of ``steps`` denoising steps."""
    try:
        scheduler.set_timesteps(steps)
    except (ValueError, IndexError, TypeError) as error:
        raise InvalidRequest("num_inference_steps", f"{type(scheduler).__name__} refuses {steps}: {error}") from error
    trained = scheduler.config.num_train_timesteps
    if float(scheduler.timesteps.max()) >= trained:
        raise InvalidRequest("num_inference_steps", f"{steps} is too many for a model trained on {trained} timesteps")
    return scheduler.timesteps


def step_arguments(scheduler: Any, *, eta: float, generator: Any) -> dict[str, Any]:
    """Keyword arguments of ``scheduler.step``, as in diffusers' ``prepare_extra_step_kwargs``."""
    parameters = inspect.signature(scheduler.step).parameters
    available = {"eta": eta, "generator": generator}
    return {name: value for name, value in available.items() if name in parameters}
