"""diffusers schedulers by class name. Each job has its own, because schedulers have state."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler
from torch import Tensor
from torch.overrides import TorchFunctionMode

from imprompt_serving.errors import InvalidRequest, RequestError
from imprompt_serving.families import get_family
from imprompt_serving.gpu import upload
from imprompt_serving.job_request import JobRequest
from imprompt_serving.specs import Bundle

_INFINITIES = {text: float(text) for sign in ("", "-") for text in (f"{sign}inf", f"{sign}Infinity")}


@contextmanager
def blame_caller(request: JobRequest, parameter: str | None = None) -> Iterator[None]:
    """Turn errors of a scheduler into `InvalidRequest` within the context, as it works with the caller's values.

    Args:
        parameter: the parameter to blame if the caller did not configure the scheduler; None if such an error is ours.
    """
    try:
        yield
    except (RequestError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if request.settings.scheduler_config:
            parameter = "scheduler_config"
        elif request.settings.scheduler and parameter is None:
            parameter = "scheduler"
        if parameter is None:
            raise
        name = request.settings.scheduler or "the scheduler"
        raise InvalidRequest(parameter, f"{name} failed: {error or type(error).__name__}") from error


def make_scheduler(bundle: Bundle, request: JobRequest) -> Any:
    """Make the scheduler that diffusers' pipeline would use for `request`.

    By default that is the bundle's own scheduler, as the pipeline corrects it. A caller may choose another class,
    override single values, or send a whole configuration.

    Raises:
        InvalidRequest: the class does not have a key, or refuses a value.
    """
    scheduler = copy.deepcopy(_cached_scheduler(_key(bundle.scheduler, bundle.scheduler_config)))
    scheduler.register_to_config(**get_family(bundle.family).scheduler_corrections(scheduler.config, request))
    if request.settings.scheduler is not None or request.settings.scheduler_config:
        with blame_caller(request):
            key = _requested_key(request, request.settings.scheduler or bundle.scheduler, scheduler.config)
            scheduler = copy.deepcopy(_cached_scheduler(key))
    if isinstance(scheduler, diffusers.DPMSolverSDEScheduler):
        # It draws noise with separate seeds, which are random unless set.
        configured = scheduler.config.noise_sampler_seed
        seeds = [seed % 2**64 for seed in (request.seeds if configured is None else (configured,))]
        scheduler.noise_sampler_seed = seeds if len(seeds) > 1 else seeds[0]
    return scheduler


def _requested_key(request: JobRequest, name: str, own: Mapping[str, Any]) -> str:
    """Return the key of the requested scheduler of class `name`, which replaces one with the configuration `own`."""
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    defaults = {key: parameter.default for key, parameter in parameters.items() if key != "self"}
    given = {key: _restored(value, defaults.get(key)) for key, value in request.settings.scheduler_config.items()}
    unset = given.pop("_use_default_values", None)
    if unset is not None:  # a whole configuration; as diffusers does, ignore keys that the class does not have
        return _key(name, {key: value for key, value in given.items() if key in defaults and key not in unset})
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise InvalidRequest("scheduler_config", f"{name} has no {', '.join(unknown)}, only {', '.join(defaults)}")
    return _key(name, own, given)


def _restored(value: Any, default: Any) -> Any:
    """Restore a value from JSON, which has no infinities: callers send strings, or null for the default."""
    if value is None:
        return default
    return _INFINITIES.get(value, value) if isinstance(value, str) else value


def _key(name: str, config: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> str:
    return json.dumps((name, config, overrides or {}))  # keeps infinities, which msgspec would turn into null


@lru_cache(maxsize=16)
def _cached_scheduler(key: str) -> Any:
    """Return a scheduler to copy, by its class, configuration, and overrides as JSON. Making one is slow."""
    name, config, overrides = json.loads(key)
    return getattr(diffusers, name).from_config(config, **overrides)


def set_timesteps(scheduler: Any, steps: int, timesteps: Sequence[int] = (), sigmas: Sequence[float] = ()) -> Any:
    """Set and return the timesteps of `steps` denoising steps, or custom ones (diffusers' `retrieve_timesteps`).

    Raises:
        ValueError: the model was not trained on these timesteps, or the noise levels are NaN.
        Exception: whatever diffusers raises.
    """
    if timesteps:
        scheduler.set_timesteps(timesteps=[*timesteps])
    elif sigmas:
        scheduler.set_timesteps(sigmas=[*sigmas])
    else:
        scheduler.set_timesteps(steps)
    trained, last = scheduler.config.num_train_timesteps, float(scheduler.timesteps.max())
    if last >= trained:
        raise ValueError(f"{steps} steps reach timestep {last:g} of a model trained on {trained}")
    if torch.as_tensor(getattr(scheduler, "sigmas", 0.0)).isnan().any():
        raise ValueError("its noise levels are NaN")
    return scheduler.timesteps


def draw_noise_on_cpu(scheduler: Any, latents: Tensor, device: torch.device) -> None:
    """Make `DPMSolverSDEScheduler` draw the noise for `latents` on the CPU. Its timesteps must be set.

    By default it draws on the device of the latents, where a seed gives different numbers.
    """
    if not isinstance(scheduler, diffusers.DPMSolverSDEScheduler):
        return
    sigmas = scheduler.sigmas[scheduler.sigmas > 0]
    seed = scheduler.noise_sampler_seed
    sampler = BrownianTreeNoiseSampler(latents.cpu(), sigmas.min().item(), sigmas.max().item(), seed)

    def noise(*interval: Tensor) -> Tensor:
        if not all(sigma.isfinite() for sigma in interval):  # the sampler would never return
            raise ValueError("its noise levels are not finite")
        drawn: Tensor = upload(sampler(*interval), device)
        return drawn

    scheduler.noise_sampler = noise


def step_arguments(scheduler: Any, *, eta: float, generator: Any) -> dict[str, Any]:
    """Return the keyword arguments that `scheduler.step` takes (diffusers' `prepare_extra_step_kwargs`)."""
    parameters = inspect.signature(scheduler.step).parameters
    available = {"eta": eta, "generator": generator}
    return {name: value for name, value in available.items() if name in parameters}


def noise_level(scheduler: Any, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors by which `scheduler.add_noise` multiplies a picture and noise at `timestep` [1].

    `add_noise` itself would copy its tables to the device of the pictures at each call.
    """
    picture, noise = scheduler.add_noise(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), timestep)
    return picture, noise


def without_waiting(device: torch.device) -> AbstractContextManager[Any]:
    """Keep a scheduler's step on tensors on `device` from waiting for the device, within the context."""
    return nullcontext() if device.type == "cpu" else _WithoutWaiting()


class _WithoutWaiting(TorchFunctionMode):
    """Changes where schedulers compute, not what they compute.

    diffusers' schedulers keep their tables on the CPU. Some copy numbers to the device one by one and solve equations
    there, which torch checks for errors at once; some copy noise. Here single numbers stay on the CPU, because torch
    can combine them with tensors on any device, and so equations are solved there too. Everything else is copied
    without waiting.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ones and args == ((),):
            kwargs.pop("device", None)
        elif func is torch.Tensor.to and args[0].device.type == "cpu":
            tensor, *rest = args
            device = kwargs.pop("device", None) or next((a for a in rest if isinstance(a, str | torch.device)), None)
            if device is not None:
                rest = [a for a in rest if not isinstance(a, str | torch.device)]
                tensor = tensor.to(*rest, **kwargs) if rest or kwargs else tensor
                return tensor if not tensor.ndim else upload(tensor, torch.device(device))
        return func(*args, **kwargs)
