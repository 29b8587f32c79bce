"""One request in the denoiser: latents, scheduler, and conditioning, advanced one step at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from imprompt_serving.denoiser.admission import Load
from imprompt_serving.denoiser.conditioning import CPU, Conditioning
from imprompt_serving.denoiser.control import PreparedControlNet, is_active
from imprompt_serving.denoiser.initial_latents import generators, make_initial_latents
from imprompt_serving.denoiser.preview import predicted_latents
from imprompt_serving.denoiser.protocol import RowBlock
from imprompt_serving.denoiser.schedulers import (
    blame_caller,
    draw_noise_on_cpu,
    make_scheduler,
    noise_level,
    set_timesteps,
    step_arguments,
    without_waiting,
)
from imprompt_serving.denoiser.windows import Window, merge, select_frames, windows
from imprompt_serving.errors import InvalidRequest, RequestError
from imprompt_serving.gpu import download, upload
from imprompt_serving.job_request import JobRequest, batch_key, lora_set
from imprompt_serving.parameters import ROWS, Type
from imprompt_serving.scheduler_names import CUSTOM_STEPS
from imprompt_serving.specs import Bundle
from imprompt_serving.tensor_names import NEGATIVE, image_embeds

_LARGEST_USUAL_SCALE, _LARGEST_USUAL_LORA_SCALE, _LARGEST_USUAL_VALUE = 100.0, 2.0, 1000.0
"""No sensible scale, and no output of an encoder, exceeds these."""
_TENSORS = tuple(row.name for row in ROWS if row.type is Type.TENSOR)


class Job:
    """One request as the loop runs it (see `protocol.LoopJob`).

    A row is one latent sample in one guidance branch: first the unconditional rows of all pictures, then the
    conditional ones. Once guidance has ended, only conditional rows remain. A "picture" may be a clip; a clip that
    runs in windows has these rows for each window, one window after the other.

    Latents are kept on `device`. Noise is drawn on the CPU, so that a seed gives the same picture on every device.
    """

    def __init__(
        self,
        request: JobRequest,
        bundle: Bundle,
        conditioning: Conditioning,
        tensors: Mapping[str, Tensor],
        device: torch.device = CPU,
    ) -> None:
        self.request = request
        self.id = request.id
        self.pictures = conditioning.pictures
        self._guided = bundle.guided(request)
        self.arrived = time.monotonic()
        self.deadline = None if request.timeout is None else self.arrived + request.timeout
        self.started: float | None = None
        self.last_served_tick = 0
        """The tick that last served this job, or in which it arrived."""

        self._scheduler = make_scheduler(bundle, request)
        settings = request.settings
        parameter = next((name for name in CUSTOM_STEPS if getattr(settings, name)), "num_inference_steps")
        with blame_caller(request, parameter):
            set_timesteps(self._scheduler, settings.steps, settings.timesteps, settings.sigmas)
        generator = generators(request.seeds)
        self._step_arguments = step_arguments(self._scheduler, eta=request.settings.eta, generator=generator)
        initial = make_initial_latents(request, bundle, tensors, self._scheduler, generator, self.pictures)
        with blame_caller(request):
            draw_noise_on_cpu(self._scheduler, initial.latents, device)
        self._initial = initial.to(device)
        self._likely_cause = likely_cause(request, tensors)
        self.latents = self._initial.latents
        self._timesteps = self._initial.timesteps
        self._device_timesteps = upload(self._timesteps.to(torch.float32), device)
        self._conditioning = conditioning
        self._index = 0
        self.windows = self._windows()
        """The windows of the current step: for most clips one window with all frames; empty for pictures."""
        self.frames = len(self.windows[0]) if self.windows else 1
        """Frames per row; 1 for pictures."""
        self.batch_key = batch_key(
            bundle,
            request.settings,
            request.frames,
            request.context,
            regions=conditioning.regions,
            text_tokens=conditioning.text_tokens,
        )
        """Jobs with equal keys can share a call."""
        self.loras = lora_set(request.settings)

        self._output_rows: list[Tensor] = []
        self._model_input: Tensor | None = None
        self.predicted: Tensor | None = None
        """The clean latents that the last step predicted [pictures, C, h, w], for jobs that want previews."""

    @property
    def branches(self) -> int:
        """Guidance branches of the current step, as with diffusers' `SDCFGCutoffCallback`, which acts after a step."""
        ended = self._index > int(len(self._timesteps) * self.request.settings.guidance_end)
        return 2 if self._guided and not ended else 1

    @property
    def rows(self) -> int:
        """Rows of the current step."""
        return self.pictures * self.branches * max(len(self.windows), 1)

    @property
    def pending(self) -> int:
        """Rows of the current step that no call has computed yet."""
        return self.rows - sum(len(rows) for rows in self._output_rows)

    @property
    def load(self) -> Load:
        """The work that it still needs from the UNet."""
        return Load(self.rows * self.frames, len(self._timesteps) - self._index, self.batch_key)

    @property
    def done(self) -> bool:
        return self._index == len(self._timesteps)

    @property
    def steps(self) -> int:
        """The total number of denoising steps; fewer than requested if `strength` skips some."""
        return self._initial.steps

    @property
    def step(self) -> int:
        """The number of finished steps, as diffusers' progress bar counts them: a step may take several UNet calls."""
        if self.done:
            return self.steps
        order = self._scheduler.order
        warm_up_calls = max(len(self._timesteps) - self.steps * order, 0)
        return min(max(self._index - warm_up_calls, 0) // order, self.steps)

    def conditioning(self) -> Mapping[str, Tensor]:
        """Return the conditioning rows of the current step by input name: the same object until they change."""
        return self._conditioning.at(self._index, len(self._timesteps))

    def blocks(self, start: int, stop: int) -> Iterator[RowBlock]:
        """Split rows `start` to `stop` of the current step where a guidance branch or a window ends."""
        first_branch = 1 if self._guided and self.branches == 1 else 0
        for block in range(start // self.pictures, -(-stop // self.pictures)):
            window, branch = divmod(block, self.branches)
            first = block * self.pictures
            pictures = range(max(start - first, 0), min(stop - first, self.pictures))
            offset = (first_branch + branch) * self.pictures
            conditioning = range(offset + pictures.start, offset + pictures.stop)
            yield RowBlock(conditioning, pictures, self.windows[window] if len(self.windows) > 1 else None)

    def controls(self) -> list[PreparedControlNet]:
        """Return the ControlNets that are active in the current step."""
        count = len(self._timesteps)
        return [net for net in self._conditioning.controls if is_active(net.start, net.end, self._index, count)]

    def model_input(self) -> tuple[Tensor, Tensor]:
        """Return the latents [rows, C, h, w] (clips: [rows, C, F, h, w]) and timesteps [rows] of the current step."""
        timestep = self._timesteps[self._index]
        if self._model_input is None:
            with blame_caller(self.request):
                scaled = self._scheduler.scale_model_input(self.latents, timestep)
            if self._initial.channels is not None:
                scaled = torch.cat([scaled, self._initial.channels], dim=1)
            views = [scaled]
            if len(self.windows) > 1:
                views = [select_frames(scaled, window, axis=2) for window in self.windows]
            self._model_input = torch.cat([view for view in views for _ in range(self.branches)])
        return self._model_input, self._device_timesteps[self._index].expand(self.rows)

    def add_output_rows(self, noise_pred: Tensor) -> None:
        """Add the UNet's output for the next `len(noise_pred)` pending rows. Once no rows are pending, take the step.

        Multistep schedulers keep earlier outputs, so the caller must not write to the tensor afterwards.
        """
        self._output_rows.append(noise_pred)
        if not self.pending:
            self._step()

    def _step(self) -> None:
        noise_pred = self._output_rows[0] if len(self._output_rows) == 1 else torch.cat(self._output_rows)
        if len(self.windows) > 1:
            noise_pred = merge(noise_pred, self.windows, self.latents.shape[2])
        if self.branches == 2:
            unconditional, conditional = noise_pred.chunk(2)
            noise_pred = unconditional + self.request.settings.guidance_scale * (conditional - unconditional)
            if self.request.settings.guidance_rescale > 0:
                noise_pred = rescale_guided(noise_pred, conditional, self.request.settings.guidance_rescale)
        timestep = self._timesteps[self._index]
        with blame_caller(self.request):
            if self._previews_this_step():
                model_input = self._scheduler.scale_model_input(self.latents, timestep)
                self.predicted = predicted_latents(self._scheduler, timestep, model_input, noise_pred)
            with without_waiting(self.latents.device):
                self.latents, *_ = self._scheduler.step(
                    noise_pred, timestep, self.latents, **self._step_arguments, return_dict=False
                )
        self._index += 1
        self.windows = self._windows()
        self._output_rows = []
        self._model_input = None
        if self._initial.blend is not None:
            self._restore_unmasked(*self._initial.blend)

    def _previews_this_step(self) -> bool:
        """Return whether a progress answer with a preview follows the current step."""
        settings = self.request.settings
        due = (self.step + 1) % settings.progress_every == 0
        return self.request.reports_progress and settings.preview and due

    def result(self) -> Tensor:
        """Copy the final latents to the CPU, and wait for the copy. The device must have finished computing them.

        Raises:
            InvalidRequest: the latents overflowed, and the caller gave a value that probably caused it.
            RequestError: they overflowed, and the caller gave no such value.
        """
        latents = download(self.latents)
        if latents.isfinite().all():
            return latents
        problem = "the latents overflowed (infinity or NaN)"
        if self._likely_cause is None:
            raise RequestError(problem)
        raise InvalidRequest(self._likely_cause, f"{problem} with this value")

    def _windows(self) -> list[Window]:
        request = self.request
        if request.frames is None or request.context is None:
            return []
        return windows(self._index, request.frames, request.context)

    def _restore_unmasked(self, noise: Tensor, image: Tensor, mask: Tensor) -> None:
        """Put the original picture back outside of the mask, at the noise level of the next step."""
        if not self.done:
            with blame_caller(self.request):
                level = noise_level(self._scheduler, self._timesteps[self._index : self._index + 1])
            image = level[0] * image + level[1] * noise
        self.latents = (1 - mask) * image + mask * self.latents


def likely_cause(request: JobRequest, tensors: Mapping[str, Tensor]) -> str | None:
    """Return the parameter most likely to blame if the latents overflow, or None if the caller set no such value."""
    if request.settings.scheduler_config:
        return "scheduler_config"
    if abs(request.settings.guidance_scale) > _LARGEST_USUAL_SCALE:
        return "guidance_scale"
    if any(_largest(use.scale) > _LARGEST_USUAL_SCALE for use in request.adapters):
        return "ip_adapter_scale"
    if any(abs(use.scale) > _LARGEST_USUAL_SCALE for use in request.controls):
        return "controlnet_conditioning_scale"
    if any(abs(scale) > _LARGEST_USUAL_LORA_SCALE for scale in request.settings.lora.values()):
        return "lora"
    own_names = {parameter: (parameter,) for parameter in _TENSORS}
    embeds = tuple(prefix + image_embeds(use.name) for use in request.adapters for prefix in ("", NEGATIVE))
    for parameter, names in {"ip_adapter_image_embeds": embeds, **own_names}.items():
        if any(tensors[name].abs().max() > _LARGEST_USUAL_VALUE for name in names if name in tensors):
            return parameter
    return None if request.settings.scheduler is None else "scheduler"


def _largest(scale: Any) -> float:
    """Return the largest absolute value in a scale, which may be nested."""
    if isinstance(scale, dict):
        scale = list(scale.values())
    return max(map(_largest, scale), default=0.0) if isinstance(scale, list) else abs(scale)


def rescale_guided(noise_pred: Tensor, conditional: Tensor, share: float) -> Tensor:
    """Rescale guided noise to the standard deviation of the conditional noise (https://arxiv.org/abs/2305.08891).

    A copy of diffusers' `rescale_noise_cfg`, because importing its module loads the whole pipeline with its text
    models.
    """
    axes = tuple(range(1, noise_pred.ndim))
    rescaled = noise_pred * (conditional.std(dim=axes, keepdim=True) / noise_pred.std(dim=axes, keepdim=True))
    return share * rescaled + (1 - share) * noise_pred
