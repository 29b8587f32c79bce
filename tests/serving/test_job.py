"""The steps of a job, and the errors of one that overflows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from imprompt_bench.rig import WIDTH, Rig, sd15
from imprompt_serving.denoiser.conditioning import Conditioner
from imprompt_serving.denoiser.initial_latents import generators, make_initial_latents
from imprompt_serving.denoiser.job import Job, likely_cause
from imprompt_serving.denoiser.schedulers import make_scheduler, set_timesteps
from imprompt_serving.errors import InvalidRequest, RequestError
from imprompt_serving.job_request import AdapterOptions, ContextWindow, ControlOptions
from imprompt_serving.specs import Motion
from jobs import job_request


class Half:
    """A UNet that predicts half of its input as noise, and infinity for rows with large values."""

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        noise = tensors["sample"] * np.float32(0.5)
        large = np.abs(tensors["sample"]).max(axis=(1, 2, 3)) > 1e3
        noise[large] = np.inf
        return {"noise_pred": noise}


def test_a_job_that_overflows_names_the_cause_and_does_not_fail_others() -> None:
    rig = Rig(sd15(rows=4), Half())
    expected = rig.submit(rig.job("alone", steps=3, size=64, seed=5))()
    bad = rig.job("bad", steps=3, size=64, scheduler="DDPMScheduler")
    bad.latents *= 1e4
    waits = [rig.submit(job) for job in (bad, rig.job("good", steps=3, size=64, seed=5))]
    with pytest.raises(InvalidRequest, match="scheduler: the latents overflowed"):
        waits[0]()
    assert torch.allclose(waits[1](), expected, atol=1e-5)
    own = rig.job("own", steps=3, size=64)
    own.latents *= 1e4
    with pytest.raises(RequestError) as caught:
        rig.submit(own)()
    assert caught.value.status == "INTERNAL"
    rig.denoiser.stop()


@pytest.mark.parametrize(
    ("parameter", "changes", "embedding"),
    [
        (None, {}, 1.0),
        ("scheduler", {"scheduler": "DDPMScheduler"}, 1.0),
        ("scheduler_config", {"scheduler_config": {"variance_type": "fixed_large_log"}, "guidance_scale": 1e4}, 1.0),
        ("guidance_scale", {"guidance_scale": -1e4, "scheduler": "DDPMScheduler"}, 1.0),
        ("ip_adapter_scale", {"adapters": (AdapterOptions(name="plain", scale=1e4),)}, 1.0),
        ("ip_adapter_scale", {"adapters": (AdapterOptions(name="plain", scale={"up": {"block_0": [0, -1e4]}}),)}, 1.0),
        ("controlnet_conditioning_scale", {"controls": (ControlOptions(name="depth", scale=-1e4),)}, 1.0),
        ("lora", {"lora": {"soft": -8.0}}, 1.0),
        (None, {"lora": {"soft": 1.0}}, 1.0),
        ("ip_adapter_image_embeds", {"adapters": (AdapterOptions(name="plain"),)}, 9e3),
    ],
)
def test_likely_cause_of_an_overflow(parameter: str | None, changes: dict[str, Any], embedding: float) -> None:
    tensors = {"image_embeds_plain": torch.full((1, 4), embedding), "prompt_embeds": torch.zeros(1, 4)}
    assert likely_cause(job_request(**changes), tensors) == parameter


BUNDLE = sd15(rows=4)
PICTURE = {
    "prompt_embeds": torch.zeros(1, 77, 768),
    "negative_prompt_embeds": torch.zeros(1, 77, 768),
    "image_moments": torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(1)),
    "masked_image_moments": torch.zeros(1, 8, 8, 8),
    "mask": torch.eye(8)[None, None],
}


def start(task: str = "text-to-image", **changes: Any) -> tuple[Job, Any, Any]:
    """Make a job of 3 steps, and a second scheduler and initial latents like its own."""
    request = job_request(task, num_inference_steps=3, **changes)
    scheduler, generator = make_scheduler(BUNDLE, request), generators(request.seeds)
    set_timesteps(scheduler, 3)
    job = Job(request, BUNDLE, Conditioner(BUNDLE, {})(request, PICTURE), PICTURE)
    return job, scheduler, make_initial_latents(request, BUNDLE, PICTURE, scheduler, generator, pictures=1)


def test_inpainting_restores_the_picture_outside_of_the_mask() -> None:
    job, scheduler, initial = start("inpainting", guidance_scale=1.0)
    noise, image, mask = initial.blend
    outside = (1 - mask).bool().expand_as(image)
    for step in range(3):
        computed = scheduler.step(torch.zeros_like(image), scheduler.timesteps[step], job.latents).prev_sample
        job.add_output_rows(torch.zeros_like(image))
        expected = image
        if step < 2:
            expected = scheduler.add_noise(image, noise, scheduler.timesteps[step + 1 : step + 2])
        torch.testing.assert_close(job.latents[outside], expected[outside])
        torch.testing.assert_close(job.latents[~outside], computed[~outside])
    assert job.done


@pytest.mark.parametrize("guidance_rescale", [0.0, 0.7])
def test_guidance_is_that_of_diffusers(guidance_rescale: float) -> None:
    job, scheduler, initial = start(guidance_scale=7.5, guidance_rescale=guidance_rescale)
    unconditional, conditional = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    guided = unconditional + 7.5 * (conditional - unconditional)
    if guidance_rescale:
        guided = rescale_noise_cfg(guided, conditional, guidance_rescale)
    job.add_output_rows(unconditional)
    assert job.pending == 1
    assert job.step == 0
    job.add_output_rows(conditional)
    assert (job.pending, job.step, job.steps) == (2, 1, 3)
    expected = scheduler.step(guided, scheduler.timesteps[0], initial.latents).prev_sample
    torch.testing.assert_close(job.latents, expected)


@pytest.mark.parametrize(("frames", "rows"), [(None, 4), (8, 32)])
def test_load_counts_the_rows_of_all_pictures_or_frames(frames: int | None, rows: int) -> None:
    """Two results, each with and without guidance."""
    bundle = msgspec.structs.replace(sd15(rows=8), motion=Motion(window=16))
    asked = job_request(num_images_per_prompt=2, frames=frames, context=frames and ContextWindow(length=frames))
    embeds = {f"{prefix}prompt_embeds": torch.zeros(1, 77, WIDTH) for prefix in ("", "negative_")}
    job = Job(asked, bundle, Conditioner(bundle, {})(asked, embeds), embeds)
    assert (job.load.rows, job.load.steps) == (rows, 4)


def test_a_clip_without_a_context_window_has_no_windows() -> None:
    asked = job_request(frames=8)
    embeds = {f"{prefix}prompt_embeds": torch.zeros(1, 77, WIDTH) for prefix in ("", "negative_")}
    bundle = msgspec.structs.replace(sd15(rows=8), motion=Motion(window=16))
    assert Job(asked, bundle, Conditioner(bundle, {})(asked, embeds), embeds).windows == []


def test_steps_are_counted_as_by_the_progress_bar_of_diffusers() -> None:
    """Heun calls the UNet twice per step, except for the last one; two of three steps remain at strength 0.7."""
    job, _, _ = start("image-to-image", guidance_scale=1.0, strength=0.7, scheduler="HeunDiscreteScheduler")
    counts = [(job.step, job.steps, job.load.steps)]
    while not job.done:
        job.add_output_rows(torch.zeros(1, 4, 8, 8))
        counts.append((job.step, job.steps, job.load.steps))
    assert counts == [(0, 2, 3), (0, 2, 2), (1, 2, 1), (2, 2, 0)]


@pytest.mark.parametrize("wanted", [True, False])
def test_previews_are_only_predicted_for_reported_steps(wanted: bool) -> None:
    job, _, _ = start(guidance_scale=1.0, reports_progress=wanted, preview=True, progress_every=2)
    found = []
    while not job.done:
        job.add_output_rows(torch.zeros(1, 4, 8, 8))
        found.append(job.predicted)
    assert [one is not None for one in found] == [False, wanted, wanted]
    assert found[2] is found[1]
