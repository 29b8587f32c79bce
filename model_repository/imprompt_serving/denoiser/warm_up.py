"""Run small jobs before the first real one, so that no caller waits for what is loaded or compiled at first use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from imprompt_serving import tensor_names
from imprompt_serving.denoiser.answers import Outcome
from imprompt_serving.denoiser.batch import Batcher
from imprompt_serving.denoiser.conditioning import Conditioner
from imprompt_serving.denoiser.job import Job
from imprompt_serving.denoiser.loop import Denoiser
from imprompt_serving.denoiser.networks import StepNetworks
from imprompt_serving.denoiser.preview import previews
from imprompt_serving.errors import RequestError
from imprompt_serving.families import get_family
from imprompt_serving.job_request import AdapterOptions, ContextWindow, ControlOptions, JobRequest
from imprompt_serving.parameters import Settings
from imprompt_serving.specs import Bundle, CallRows

WAIT_S = 600.0
STOP_S = 10.0
"""How long a failed warm-up waits for its threads to end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmUpJob:
    """A job of one step: a picture or clip for each of `prompts`, in one guidance branch unless `guided`."""

    size: tuple[int, int]
    """Height and width."""
    prompts: int = 1
    frames: int | None = None
    guided: bool = False
    adapters: bool = True
    masks: bool = False
    loras: bool = False
    controls: bool = False


def warm_up_jobs(bundle: Bundle, call_rows: CallRows) -> Iterator[WarmUpJob]:
    """Yield the jobs to run: first a picture of the smallest size, with every adapter, mask, and LoRA.

    If rows are bucketed, jobs for every bucket at the default size follow, with image prompts and ControlNets, and
    without; also for clips of the usual length, with as many rows as then fit.
    """
    yield WarmUpJob(size=(bundle.shapes.height.min, bundle.shapes.width.min), guided=True, masks=True, loras=True)
    if not call_rows.bucketed:
        return
    usual = bundle.default_height, bundle.default_width
    clip = None if bundle.motion is None else min(bundle.shapes.frames.opt, bundle.motion.window)
    for frames in (None, clip)[: 1 if clip is None else 2]:
        for rows in call_rows.of_frames(frames or 1).buckets:
            yield WarmUpJob(size=usual, prompts=rows, frames=frames, controls=True)
            if bundle.adapters:
                yield WarmUpJob(size=usual, prompts=rows, frames=frames, adapters=False)


def warm_up(
    bundle: Bundle, conditioner: Conditioner, networks: StepNetworks, device: torch.device, call_rows: CallRows
) -> None:
    """Run all `warm_up_jobs`, one after the other.

    Raises:
        RequestError: an engine failed, or a job took too long.
    """
    denoiser = Denoiser(networks, Batcher(bundle, call_rows), call_rows)
    try:
        for planned in warm_up_jobs(bundle, call_rows):
            request, tensors = _request(planned, bundle), _tensors(planned, bundle)
            _run(denoiser, Job(request, bundle, conditioner(request, tensors), tensors, device), bundle)
    finally:
        denoiser.stop(STOP_S)


def _run(denoiser: Denoiser, job: Job, bundle: Bundle) -> None:
    outcome = Outcome()
    denoiser.submit(job, outcome)
    if not outcome.ended.wait(WAIT_S):
        raise RequestError(f"the warm-up did not finish a step within {WAIT_S:g} seconds")
    if outcome.error:
        raise outcome.error
    job.result()
    if job.predicted is not None:
        previews(job.predicted, bundle)


def _request(job: WarmUpJob, bundle: Bundle) -> JobRequest:
    nets = bundle.net_names if job.frames is None else tuple(net.name for net in bundle.controlnets)
    return JobRequest(
        id="warm-up",
        task=bundle.plain_task if job.frames is None else "text-to-image",
        settings=Settings.with_defaults(
            height=job.size[0],
            width=job.size[1],
            num_inference_steps=1,
            guidance_scale=7.5 if job.guided else 1.0,
            strength=1.0,
            preview=True,
            lora=dict.fromkeys(bundle.loras if job.loras else (), 1.0),
        ),
        seeds=(0,),
        adapters=tuple(AdapterOptions(name=adapter.name) for adapter in bundle.adapters if job.adapters),
        controls=tuple(ControlOptions(name=name) for name in nets if job.controls),
        frames=job.frames,
        context=None if job.frames is None else ContextWindow(length=job.frames),
        reports_progress=True,
    )


def _tensors(job: WarmUpJob, bundle: Bundle) -> dict[str, Tensor]:
    texts = get_family(bundle.family).text_shapes(bundle)
    latent = [size // bundle.vae_scale_factor for size in job.size]
    moments = torch.zeros(1, 2 * bundle.latent_channels, *latent)
    tensors = {"mask": torch.ones(1, 1, *latent), "image_moments": moments, "masked_image_moments": moments}
    for prefix in ("", tensor_names.NEGATIVE):
        tensors |= {prefix + name: torch.zeros(job.prompts, *shape) for name, shape in texts.items()}
        for adapter in bundle.adapters:
            tensors[prefix + tensor_names.image_embeds(adapter.name)] = torch.zeros(1, *adapter.embed_shape)
            if adapter.clip_shape:
                tensors[prefix + tensor_names.clip_embeds(adapter.name)] = torch.zeros(1, *adapter.clip_shape)
    if job.masks:
        for adapter in bundle.adapters:
            tensors[tensor_names.adapter_masks(adapter.name)] = torch.ones(1, *job.size)
    # One control image per prompt or frame: the most rows that the engines which embed them take.
    channels = dict.fromkeys((net.name for net in bundle.controlnets), 3)
    channels |= {adapter.name: adapter.channels for adapter in bundle.t2i_adapters}
    for name, count in channels.items():
        tensors[tensor_names.control_image(name)] = torch.zeros(job.frames or job.prompts, count, *job.size)
    return tensors
