"""A small job before the first real one, so that no caller pays for what is loaded at first use."""

from __future__ import annotations

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
from imprompt_serving.job import AdapterUse, JobRequest
from imprompt_serving.parameters import Settings
from imprompt_serving.specs import Bundle

WAIT_S = 600.0
STOP_S = 10.0
"""How long a warm-up that failed waits for its thread to end."""


def warm_up(bundle: Bundle, conditioner: Conditioner, networks: StepNetworks, device: torch.device) -> None:
    """Denoise one picture of the smallest size with every adapter and mask, in one step.

    Raises:
        RequestError: the engines do not work.
    """
    height, width = bundle.shapes.height.min, bundle.shapes.width.min
    request = JobRequest(
        id="warm-up",
        task="inpainting" if bundle.unet_channels != bundle.latent_channels else "text-to-image",
        settings=Settings.with_defaults(
            height=height, width=width, num_inference_steps=1, guidance_scale=7.5, strength=1.0, preview=True
        ),
        seeds=(0,),
        adapters=tuple(AdapterUse(name=adapter.name) for adapter in bundle.adapters),
        reports_progress=True,
    )
    tensors = _tensors(bundle, height, width)
    job = Job(request, bundle, conditioner(request, tensors), tensors, device)
    denoiser, outcome = Denoiser(networks, Batcher(bundle), bundle.shapes.rows.max), Outcome()
    try:
        denoiser.submit(job, outcome)
        if not outcome.ended.wait(WAIT_S):
            raise RequestError(f"the first step was not done after {WAIT_S:g} seconds")
    finally:
        denoiser.stop(STOP_S)
    if outcome.error:
        raise outcome.error
    if job.predicted is not None:
        previews(job.predicted, bundle)


def _tensors(bundle: Bundle, height: int, width: int) -> dict[str, Tensor]:
    texts = get_family(bundle.family).text_shapes(bundle)
    latent = height // bundle.vae_scale_factor, width // bundle.vae_scale_factor
    moments = torch.zeros(1, 2 * bundle.latent_channels, *latent)
    tensors = {"mask": torch.ones(1, 1, *latent), "image_moments": moments, "masked_image_moments": moments}
    for prefix in ("", tensor_names.NEGATIVE):
        tensors |= {prefix + name: torch.zeros(1, *shape) for name, shape in texts.items()}
        for adapter in bundle.adapters:
            tensors[prefix + tensor_names.image_embeds(adapter.name)] = torch.zeros(1, *adapter.embed_shape)
            if adapter.clip_shape:
                tensors[prefix + tensor_names.clip_embeds(adapter.name)] = torch.zeros(1, *adapter.clip_shape)
    for adapter in bundle.adapters:
        tensors[tensor_names.adapter_masks(adapter.name)] = torch.ones(1, height, width)
    return tensors
