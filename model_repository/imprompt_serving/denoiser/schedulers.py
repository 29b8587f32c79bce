"""diffusers schedulers by class name; each job has its own, for they keep state."""

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
    """Within, a scheduler works with values of the caller, who is to blame for whatever it raises.

    Args:
        parameter: what is wrong if the caller said nothing about the scheduler; None if that is a fault of ours.
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
        raise InvalidRequest(parameter, f"{name} does not work: {error or type(error).__name__}") from error


def make_scheduler(bundle: Bundle, request: JobRequest) -> Any:
    """The scheduler that diffusers' pipeline for ``request`` would have: the bundle's own as that pipeline corrects it,
    one made from it with another class or single values replaced, or one made from the caller's whole configuration.

    Raises:
        InvalidRequest: a key the class does not take, or a value that it refuses.
    """
    made = copy.deepcopy(_made(_key(bundle.scheduler, bundle.scheduler_config)))
    made.register_to_config(**get_family(bundle.family).scheduler_corrections(made.config, request))
    if request.settings.scheduler is not None or request.settings.scheduler_config:
        with blame_caller(request):
            made = copy.deepcopy(
                _made(_callers_key(request, request.settings.scheduler or bundle.scheduler, made.config))
            )
    if isinstance(made, diffusers.DPMSolverSDEScheduler):
        # It draws its noise from seeds of its own, at random unless set.
        own = made.config.noise_sampler_seed
        seeds = [seed % 2**64 for seed in (request.seeds if own is None else (own,))]
        made.noise_sampler_seed = seeds if len(seeds) > 1 else seeds[0]
    return made


def _callers_key(request: JobRequest, name: str, own: Mapping[str, Any]) -> str:
    """Key of the scheduler of class ``name`` that a caller asks for in place of one with the configuration ``own``."""
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    defaults = {key: parameter.default for key, parameter in parameters.items() if key != "self"}
    given = {key: _restored(value, defaults.get(key)) for key, value in request.settings.scheduler_config.items()}
    unset = given.pop("_use_default_values", None)
    if unset is not None:  # a whole configuration: as in diffusers, what the class does not know is ignored
        return _key(name, {key: value for key, value in given.items() if key in defaults and key not in unset})
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise InvalidRequest("scheduler_config", f"{name} has no {', '.join(unknown)}; it has {', '.join(defaults)}")
    return _key(name, own, given)


def _restored(value: Any, default: Any) -> Any:
    """A value that came as JSON, which has no infinities: they are strings, or null, which stands for the default."""
    if value is None:
        return default
    return _INFINITIES.get(value, value) if isinstance(value, str) else value


def _key(name: str, config: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> str:
    return json.dumps((name, config, overrides or {}))  # with infinities, which msgspec makes null


@lru_cache(maxsize=16)
def _made(key: str) -> Any:
    """A scheduler to copy, from its class, configuration and overrides as JSON: making one takes far longer."""
    name, config, overrides = json.loads(key)
    return getattr(diffusers, name).from_config(config, **overrides)


def set_timesteps(scheduler: Any, steps: int) -> Any:
    """Timesteps of ``steps`` denoising steps.

    Raises:
        ValueError: the model is not trained on them; others as diffusers does.
    """
    scheduler.set_timesteps(steps)
    trained, last = scheduler.config.num_train_timesteps, float(scheduler.timesteps.max())
    if last >= trained:
        raise ValueError(f"{steps} steps reach timestep {last:g} of a model trained on {trained}")
    if torch.as_tensor(getattr(scheduler, "sigmas", 0.0)).isnan().any():
        raise ValueError("its noise levels are not numbers")
    return scheduler.timesteps


def draw_noise_on_cpu(scheduler: Any, latents: Tensor, device: torch.device) -> None:
    """Let `DPMSolverSDEScheduler`, whose timesteps are set, draw the noise for ``latents`` on the CPU.

    It would draw it where the latents are, and a seed gives other numbers on a GPU.
    """
    if not isinstance(scheduler, diffusers.DPMSolverSDEScheduler):
        return
    sigmas = scheduler.sigmas[scheduler.sigmas > 0]
    seed = scheduler.noise_sampler_seed
    sampler = BrownianTreeNoiseSampler(latents.cpu(), sigmas.min().item(), sigmas.max().item(), seed)

    def noise(*interval: Tensor) -> Tensor:
        if not all(sigma.isfinite() for sigma in interval):  # between these the sampler would search forever
            raise ValueError("its noise levels are not finite numbers")
        drawn: Tensor = upload(sampler(*interval), device)
        return drawn

    scheduler.noise_sampler = noise


def step_arguments(scheduler: Any, *, eta: float, generator: Any) -> dict[str, Any]:
    """Keyword arguments of ``scheduler.step``, as in diffusers' ``prepare_extra_step_kwargs``."""
    parameters = inspect.signature(scheduler.step).parameters
    available = {"eta": eta, "generator": generator}
    return {name: value for name, value in available.items() if name in parameters}


def noise_level(scheduler: Any, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """What `scheduler.add_noise` multiplies a picture with, and what noise, at `timestep` [1].

    `add_noise` itself would send its tables to the device of the pictures, at each call.
    """
    picture, noise = scheduler.add_noise(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), timestep)
    return picture, noise


def without_waiting(device: torch.device) -> AbstractContextManager[Any]:
    """Within, a scheduler's step on tensors on `device` does not wait for the device."""
    return nullcontext() if device.type == "cpu" else _WithoutWaiting()


class _WithoutWaiting(TorchFunctionMode):
    """Changes where schedulers compute, not what.

    diffusers' schedulers keep their tables on the CPU. Some send numbers of them to the device one by one, and solve
    equations there, whose errors are looked for at once; some send noise. Here single numbers stay on the CPU, where
    torch lets them meet tensors of any device, and with them the equations; all else is sent without waiting.
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
