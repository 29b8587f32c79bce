"""The latents that denoising starts from: noise, a noised picture, or a masked one.

Random numbers are drawn in the same order as in diffusers' pipelines, so that a seed gives the same picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from imprompt_serving.denoiser.schedulers import blame_caller
from imprompt_serving.errors import InvalidRequest
from imprompt_serving.families import get_family
from imprompt_serving.gpu import upload
from imprompt_serving.job_request import JobRequest
from imprompt_serving.specs import Bundle

Generators = torch.Generator | list[torch.Generator]


@dataclass(frozen=True, kw_only=True, slots=True)
class InitialLatents:
    """Initial latents, the remaining timesteps, and what inpainting needs at later steps."""

    latents: Tensor
    """[N, C, h, w], for clips [N, C, F, h, w]."""
    timesteps: Tensor
    """One for each UNet call."""
    steps: int
    """Denoising steps, each of which may take several calls."""
    blend: tuple[Tensor, Tensor, Tensor] | None = None
    """Noise, clean latents, and mask [N, 1, h, w], for UNets without a mask input.

    After each step, the job restores the picture outside of the mask.
    """
    channels: Tensor | None = None
    """Mask and masked picture [N, 1 + C, h, w], for UNets that take them as input."""

    def to(self, device: torch.device) -> InitialLatents:
        """Return a copy with its pictures on `device`. Timesteps stay with the scheduler, on the CPU."""
        blend = self.blend and (
            upload(self.blend[0], device),
            upload(self.blend[1], device),
            upload(self.blend[2], device),
        )
        channels = None if self.channels is None else upload(self.channels, device)
        return replace(self, latents=upload(self.latents, device), blend=blend, channels=channels)


def generators(seeds: tuple[int, ...]) -> Generators:
    """Return one generator for all pictures, or a list with one for each."""
    made = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return made if len(made) > 1 else made[0]


def make_initial_latents(
    request: JobRequest,
    bundle: Bundle,
    tensors: Mapping[str, Tensor],
    scheduler: Any,
    generator: Generators,
    pictures: int,
) -> InitialLatents:
    """Make the initial latents of `request`. The timesteps of `scheduler` must be set."""
    settings = request.settings
    # As in diffusers, custom steps are counted by their timesteps, of which second-order schedulers have more.
    steps = len(scheduler.timesteps) if settings.timesteps or settings.sigmas else settings.num_inference_steps
    initial = _initial_latents(request, bundle, tensors, scheduler, steps, generator, pictures)
    return _until_end(initial, request, scheduler)


def _initial_latents(
    request: JobRequest,
    bundle: Bundle,
    tensors: Mapping[str, Tensor],
    scheduler: Any,
    steps: int,
    generator: Generators,
    pictures: int,
) -> InitialLatents:
    if request.task == "text-to-image":
        noise = _noise(request, bundle, tensors, generator, pictures)
        with blame_caller(request):
            latents = noise * scheduler.init_noise_sigma
        return InitialLatents(latents=latents, timesteps=scheduler.timesteps, steps=steps)
    timesteps, steps = _remaining(request, scheduler, steps)
    if request.task == "image-to-image":
        if "image_latents" in tensors:
            latents = _repeat(tensors["image_latents"], pictures)
        elif request.frames is not None:
            latents = _encode_video(tensors["image_moments"], bundle, generator, pictures)
        else:
            latents = _encode(tensors["image_moments"], bundle, generator, pictures)
        if request.settings.denoising_start is None:
            noise = randn_tensor(latents.shape, generator=generator)
            with blame_caller(request):
                latents = scheduler.add_noise(latents, noise, timesteps[:1].repeat(pictures))
        if request.frames is not None:
            latents = latents.transpose(1, 2)
        return InitialLatents(latents=latents, timesteps=timesteps, steps=steps)
    return _inpaint(request, bundle, tensors, scheduler, timesteps, steps, generator, pictures)


def _inpaint(
    request: JobRequest,
    bundle: Bundle,
    tensors: Mapping[str, Tensor],
    scheduler: Any,
    timesteps: Tensor,
    steps: int,
    generator: Generators,
    pictures: int,
) -> InitialLatents:
    takes_mask = bundle.unet_channels != bundle.latent_channels
    continues = request.settings.denoising_start is not None
    pure_noise = not continues and (request.settings.strength == 1.0 or "latents" in tensors)
    image = None
    if not takes_mask or not pure_noise:
        image = _repeat(_sample(tensors["image_moments"], generator) * bundle.vae_scaling_factor, pictures)
    noise = _noise(request, bundle, tensors, generator, pictures)
    with blame_caller(request):
        if continues:
            assert image is not None
            latents = image
        elif pure_noise:
            latents = noise * scheduler.init_noise_sigma
        else:
            latents = scheduler.add_noise(image, noise, timesteps[:1].repeat(pictures))
    # Drawn for every UNet, as in diffusers, because schedulers that add noise use the same generator later.
    masked = _sample(tensors["masked_image_moments"], generator) * bundle.vae_scaling_factor
    mask = _repeat(tensors["mask"], pictures)
    if takes_mask:
        channels = torch.cat([mask, _repeat(masked, pictures)], dim=1)
        return InitialLatents(latents=latents, timesteps=timesteps, steps=steps, channels=channels)
    assert image is not None
    return InitialLatents(latents=latents, timesteps=timesteps, steps=steps, blend=(noise, image, mask))


def _noise(
    request: JobRequest, bundle: Bundle, tensors: Mapping[str, Tensor], generator: Generators, pictures: int
) -> Tensor:
    """Return the noise that the caller sent, or else draw it."""
    shape = _shape(request, bundle, pictures)
    if "latents" in tensors:
        return tensors["latents"].reshape(shape)
    drawn: Tensor = randn_tensor(shape, generator=generator)
    return drawn


def _shape(request: JobRequest, bundle: Bundle, pictures: int) -> tuple[int, ...]:
    factor = bundle.vae_scale_factor
    frames = () if request.frames is None else (request.frames,)
    return (
        pictures,
        bundle.latent_channels,
        *frames,
        request.settings.height // factor,
        request.settings.width // factor,
    )


def _remaining(request: JobRequest, scheduler: Any, steps: int) -> tuple[Tensor, int]:
    """Return the timesteps that remain of `steps` steps, and the number of steps (`get_timesteps` in diffusers).

    These are the last `strength` of them, or those after `denoising_start`.
    """
    settings, order = request.settings, scheduler.order
    if settings.denoising_start is not None:
        count = int((scheduler.timesteps < _timestep(scheduler, settings.denoising_start)).sum())
        # A step of a second-order scheduler takes two calls, except the first: do not start in the middle of one.
        count += order == 2 and count % 2 == 0
        skipped_calls = max(len(scheduler.timesteps) - count, 0)
        remaining = -(-count // order)
        parameter, value = "denoising_start", settings.denoising_start
    else:
        skipped = steps - min(int(steps * settings.strength), steps)
        skipped_calls, remaining = skipped * order, steps - skipped
        parameter, value = "num_inference_steps", settings.strength
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped_calls)
    timesteps = scheduler.timesteps[skipped_calls:]
    if not len(timesteps):
        cause = "denoising_start" if settings.denoising_start is not None else "strength"
        raise InvalidRequest(parameter, f"{cause} {value:g} leaves none of {steps} steps")
    return timesteps, remaining


def _until_end(initial: InitialLatents, request: JobRequest, scheduler: Any) -> InitialLatents:
    """Drop the timesteps after `denoising_end`."""
    end = request.settings.denoising_end
    if end is None:
        return initial
    timesteps = initial.timesteps[: int((initial.timesteps >= _timestep(scheduler, end)).sum())]
    if not len(timesteps):
        raise InvalidRequest("denoising_end", f"{end:g} leaves none of {initial.steps} steps")
    return replace(initial, timesteps=timesteps, steps=-(-len(timesteps) // scheduler.order))


def _timestep(scheduler: Any, fraction: float) -> int:
    """Return the timestep at which this fraction of the denoising is done."""
    trained = scheduler.config.num_train_timesteps
    return round(trained - fraction * trained)


def _encode(moments: Tensor, bundle: Bundle, generator: Generators, pictures: int) -> Tensor:
    if isinstance(generator, list):
        moments = _repeat(moments, pictures)
    # The family scales pictures only: for inpainting and clips, all of diffusers' pipelines use the factor alone.
    return _repeat(get_family(bundle.family).scale_latents(_sample(moments, generator), bundle), pictures)


def _encode_video(moments: Tensor, bundle: Bundle, generator: Generators, clips: int) -> Tensor:
    """Return the latents of a video for each clip [N, F, C, h, w], from its moments [F, 2 C, h, w]."""
    if isinstance(generator, list):
        sampled = torch.stack([_sample(moments, one) for one in generator])
    else:
        sampled = _sample(moments, generator).expand(clips, -1, -1, -1, -1)
    return sampled * bundle.vae_scaling_factor


def _sample(moments: Tensor, generator: Generators) -> Tensor:
    """Sample from the VAE encoder's Gaussian (diffusers' `DiagonalGaussianDistribution.sample`)."""
    mean, log_variance = moments.chunk(2, dim=1)
    if isinstance(generator, list):
        noise = torch.cat([randn_tensor((1, *mean.shape[1:]), generator=g) for g in generator[: len(mean)]])
    else:
        noise = randn_tensor(mean.shape, generator=generator)
    return mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise


def _repeat(tensor: Tensor, pictures: int) -> Tensor:
    return tensor.repeat(pictures // len(tensor), *(1,) * (tensor.ndim - 1))
