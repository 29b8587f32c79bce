"""One request in the denoiser: latents, scheduler and conditioning, advanced a step at a time."""

from __future__ import annotations

import time
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from imprompt_serving.denoiser.schedulers import make_scheduler, set_timesteps, step_arguments
from imprompt_serving.job import JobRequest
from imprompt_serving.specs import Bundle


class Job:
    """A row is one latent sample in one guidance branch: the unconditional rows of all pictures, then the others.

    Args:
        request: what was asked.
        bundle: the checkpoint set.
        conditioning: UNet inputs by name, with one row for each guidance branch and prompt: see ``Conditioning``.
    """

    def __init__(self, request: JobRequest, bundle: Bundle, conditioning: dict[str, Tensor], pictures: int) -> None:
        self.request = request
        self.id = request.id
        self.pictures = pictures
        self.branches = 2 if request.guidance_scale > 1 else 1
        self.rows = pictures * self.branches
        self.conditioning = conditioning
        self.arrived = time.monotonic()
        self.deadline = None if request.timeout is None else self.arrived + request.timeout
        self.started: float | None = None
        self.served = -1
        """Tick that last served this job; -1 before the first."""

        self._scheduler = make_scheduler(
            bundle.scheduler, bundle.scheduler_config, request.scheduler, request.scheduler_config, request.seeds[0]
        )
        self._timesteps = set_timesteps(self._scheduler, request.num_inference_steps)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in request.seeds]
        generator: Any = generators if len(generators) > 1 else generators[0]
        self._step_arguments = step_arguments(self._scheduler, eta=request.eta, generator=generator)
        size = (request.height // bundle.vae_scale_factor, request.width // bundle.vae_scale_factor)
        shape = (pictures, bundle.latent_channels, *size)
        self.latents = randn_tensor(shape, generator=generator) * self._scheduler.init_noise_sigma
        self.key = ("unet", *size)
        """Jobs with equal keys can share a call."""

        self._index = 0
        self._noise_pred = torch.empty(self.rows, *shape[1:])
        self._filled = 0
        self._model_input: Tensor | None = None

    @property
    def pending(self) -> int:
        """Rows of the current step that no call has computed yet."""
        return self.rows - self._filled

    @property
    def done(self) -> bool:
        return self._index == len(self._timesteps)

    @property
    def step(self) -> int:
        """Denoising steps done, counted as diffusers' progress bar does (a scheduler may call the UNet more often)."""
        order, steps = self._scheduler.order, self.request.num_inference_steps
        if self.done:
            return steps
        return min(max(self._index - (len(self._timesteps) - steps * order), 0) // order, steps)

    def model_input(self) -> tuple[Tensor, Tensor]:
        """Latents [rows, C, h, w] and timesteps [rows] of the current step, for all rows."""
        if self._model_input is None:
            scaled = self._scheduler.scale_model_input(self.latents, self._timesteps[self._index])
            self._model_input = torch.cat([scaled] * self.branches)
        return self._model_input, self._timesteps[self._index].to(torch.float32).expand(self.rows)

    def fill(self, noise_pred: Tensor) -> None:
        """Take the UNet's output for the next ``len(noise_pred)`` pending rows; steps when it was the last."""
        self._noise_pred[self._filled : self._filled + len(noise_pred)] = noise_pred
        self._filled += len(noise_pred)
        if not self.pending:
            self._step()

    def _step(self) -> None:
        noise_pred = self._noise_pred
        if self.branches == 2:
            unconditional, conditional = noise_pred.chunk(2)
            noise_pred = unconditional + self.request.guidance_scale * (conditional - unconditional)
            if self.request.guidance_rescale > 0:
                noise_pred = rescale_noise_cfg(noise_pred, conditional, self.request.guidance_rescale)
        timestep = self._timesteps[self._index]
        arguments = self._step_arguments
        self.latents = self._scheduler.step(noise_pred, timestep, self.latents, **arguments, return_dict=False)[0]
        self._index += 1
        self._filled = 0
        self._model_input = None
