"""Run the denoiser without a server: any bundle (such as `sd15`), random embeddings, and any engine as its UNet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imprompt_bench.checkpoints import SCHEDULER
from imprompt_serving import tensor_names
from imprompt_serving.backends import Engine
from imprompt_serving.denoiser.answers import Outcome
from imprompt_serving.denoiser.batch import Batcher
from imprompt_serving.denoiser.conditioning import CPU, Conditioner
from imprompt_serving.denoiser.job import Job
from imprompt_serving.denoiser.loop import Denoiser
from imprompt_serving.denoiser.meter import Meter
from imprompt_serving.denoiser.networks import StepNetworks
from imprompt_serving.families import get_family
from imprompt_serving.gpu import preparation_stream, record_launch
from imprompt_serving.job_request import AdapterOptions, JobRequest
from imprompt_serving.parameters import Settings
from imprompt_serving.specs import Adapter, Bundle, CrossAttention, Range, Shapes, TextEncoder

TOKENS, WIDTH, CLIP_WIDTH = 4, 768, 1024
PREVIEW = (0.3512, 0.2297, 0.3227), (0.3250, 0.4974, 0.2350), (-0.2829, 0.1762, 0.2721), (-0.2120, -0.2616, -0.7177)
"""Linear approximation of SD 1.5's VAE, from ComfyUI (comfy/latent_formats.py)."""


def sd15(*, rows: int, adapters: tuple[str, ...] = ()) -> Bundle:
    """Build a bundle with SD 1.5's shapes and plain adapters."""
    levels = [0, 0, 1, 1, 2, 2, 2, 2, 2, 1, 1, 1, 0, 0, 0, 3]
    return Bundle(
        name="bench",
        family="sd15",
        latent_channels=4,
        unet_channels=4,
        vae_scale_factor=8,
        vae_scaling_factor=0.18215,
        preview_factors=PREVIEW,
        default_height=512,
        default_width=512,
        scheduler="DDIMScheduler",
        scheduler_config={**SCHEDULER, "clip_sample": False},
        text_encoders=(TextEncoder(engine="text_encoder", max_length=77, pad_token_id=0, hidden_size=WIDTH),),
        max_clip_skip=0,
        layers=tuple(CrossAttention(name=f"layer_{index}", level=level) for index, level in enumerate(levels)),
        transformer_per_block={"down": 2, "up": 3},
        adapters=tuple(
            Adapter(name=name, kind="plain", num_tokens=TOKENS, image_encoder="clip", embed_shape=(CLIP_WIDTH,))
            for name in adapters
        ),
        shapes=Shapes(rows=Range(1, 2, rows)),
    )


class _Projection:
    """Stands in for an adapter's projection; returns the same tokens for every picture."""

    def __init__(self, tokens: int, width: int) -> None:
        self._shape = tokens, width

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"tokens": np.zeros((len(tensors["image_embeds"]), *self._shape), np.float32)}


class Rig:
    """A denoiser that runs jobs on `device` as the server's does."""

    def __init__(
        self,
        bundle: Bundle,
        unet: Engine,
        meter: Meter | None = None,
        *,
        bucketed: bool = False,
        device: torch.device = CPU,
    ) -> None:
        self.bundle, self._device = bundle, device
        self._embeds = get_family(bundle.family).text_shapes(bundle)
        width = self._embeds["prompt_embeds"][-1]
        projections = {adapter.name: _Projection(adapter.num_tokens, width) for adapter in bundle.adapters}
        self._conditioner = Conditioner(bundle, projections, device=device)
        call_rows = bundle.shapes.call_rows(bucketed=bucketed)
        networks = StepNetworks(bundle, {"unet": unet}, {}, call_rows)
        batcher = Batcher(bundle, call_rows)
        self.denoiser = Denoiser(networks, batcher, call_rows, bundle.limits, meter, partial(record_launch, device))

    def job(self, name: str, *, steps: int, size: int, seed: int = 0, **settings: Any) -> Job:
        """Build a job for a guided picture of `size` x `size` pixels, with optional further `settings`."""
        request = JobRequest(
            id=name,
            settings=Settings.with_defaults(
                height=size,
                width=size,
                num_inference_steps=steps,
                guidance_scale=7.5,
                strength=1.0,
                **settings,
            ),
            seeds=(seed,),
            adapters=tuple(AdapterOptions(name=adapter.name) for adapter in self.bundle.adapters),
        )
        tensors = self.embeddings(seed)
        with torch.no_grad(), preparation_stream(self._device):
            return Job(request, self.bundle, self._conditioner(request, tensors), tensors, self._device)

    def embeddings(self, seed: int) -> dict[str, Tensor]:
        """Draw random text and image embeddings for both guidance branches."""
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for prefix in (tensor_names.NEGATIVE, ""):
            for name, shape in self._embeds.items():
                tensors[prefix + name] = torch.randn(1, *shape, generator=generator)
            for adapter in self.bundle.adapters:
                embeds = torch.randn(1, *adapter.embed_shape, generator=generator)
                tensors[prefix + tensor_names.image_embeds(adapter.name)] = embeds
        return tensors

    def submit(self, job: Job) -> Callable[[], Tensor]:
        """Submit `job`; the returned function waits for its latents."""
        outcome = Outcome()
        self.denoiser.submit(job, outcome)

        def wait() -> Tensor:
            outcome.ended.wait()
            if outcome.error:
                raise outcome.error
            return job.result()

        return wait
