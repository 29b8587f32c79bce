"""diffusers schedulers by class name; each job has its own, for they keep state."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers

from imprompt_serving.capabilities import SCHEDULERS
from imprompt_serving.errors import InvalidRequest


def make_scheduler(default: str, config: dict[str, Any], name: str | None, overrides: dict[str, Any], seed: int) -> Any:
    """A scheduler of class ``name`` from the bundle's configuration, with single values replaced.

    Raises:
        InvalidRequest: unknown class, a key the class does not take, or a value that it refuses.
    """
    name = name or default
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
        return kind.from_config(config, **overrides)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise InvalidRequest("scheduler_config", f"{name} refuses it: {error}") from error


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
