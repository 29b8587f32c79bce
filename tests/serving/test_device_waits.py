"""No step of a job waits for the device, because ticks are launched ahead on a GPU. `meta` tensors replace a GPU."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from imprompt_bench.rig import sd15
from imprompt_serving.denoiser import job as job_module
from imprompt_serving.denoiser.batch import Batcher, RowSlice
from imprompt_serving.denoiser.conditioning import CPU, Conditioner, Conditioning
from imprompt_serving.denoiser.features import T2IFeatures
from imprompt_serving.denoiser.job import Job
from imprompt_serving.denoiser.schedulers import make_scheduler, noise_level, set_timesteps, without_waiting
from imprompt_serving.job_request import AdapterOptions, ContextWindow
from imprompt_serving.scheduler_names import SCHEDULERS
from imprompt_serving.specs import Bundle, Motion, Residual, T2IAdapter
from jobs import job_request
from traffic import Traffic

META = torch.device("meta")
TASKS = ("text-to-image", "image-to-image", "inpainting")
STEPS = 5


class Projection:
    """Replaces the image projection of an adapter."""

    def run(self, tensors: Any) -> dict[str, Any]:
        return {"tokens": torch.zeros(len(tensors["image_embeds"]), 4, 768).numpy()}


def job(device: torch.device = META, bundle: Bundle | None = None, **changes: Any) -> Job:
    """Make a job with random tensors for everything that its task needs."""
    made = bundle or sd15(rows=4)
    asked = job_request(**{"num_inference_steps": STEPS, **changes})
    generator = torch.Generator().manual_seed(1)
    pictures = max(len(asked.seeds), 1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {
        "prompt_embeds": randn(pictures, 77, 768),
        "negative_prompt_embeds": randn(pictures, 77, 768),
        "image_moments": randn(asked.frames or 1, 8, 8, 8),
        "masked_image_moments": randn(1, 8, 8, 8),
        "mask": (randn(1, 1, 8, 8) > 0).float(),
        "image_embeds_plain": randn(1, 1024),
        "negative_image_embeds_plain": randn(1, 1024),
    }
    conditioner = Conditioner(made, {"plain": Projection()}, device=device)
    return Job(asked, made, conditioner(asked, tensors), tensors, device)


def waits(one: Job, bundle: Bundle | None = None) -> list[dict[str, int]]:
    """Count, by name, the operations of each step that wait for the device."""
    batcher, found = Batcher(bundle or sd15(rows=4)), []
    while not one.done:
        with torch.no_grad(), Traffic() as traffic:
            sample = batcher.inputs([RowSlice(one, 0, one.rows)])["sample"]
            one.add_output_rows(sample * 0.5)
        found.append(dict(traffic.waits))
    return found


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_no_scheduler_waits_for_the_device(name: str, task: str) -> None:
    found = waits(job(scheduler=name, task=task, strength=0.9))
    assert len(found) >= STEPS - 1
    assert not any(found), found


@pytest.mark.parametrize(
    "changes",
    [
        {"scheduler": "DDIMScheduler", "eta": 0.7},
        {"scheduler": "TCDScheduler", "eta": 0.7},
        {"scheduler": "DPMSolverMultistepScheduler", "scheduler_config": {"algorithm_type": "sde-dpmsolver++"}},
        {"scheduler": "DPMSolverSinglestepScheduler", "scheduler_config": {"algorithm_type": "sde-dpmsolver++"}},
        {"scheduler": "UniPCMultistepScheduler", "scheduler_config": {"solver_order": 3}},
        {"scheduler": "UniPCMultistepScheduler", "scheduler_config": {"solver_type": "bh1", "predict_x0": False}},
        {"scheduler": "EulerDiscreteScheduler", "scheduler_config": {"use_karras_sigmas": True}},
        {"scheduler": "DDPMScheduler", "scheduler_config": {"thresholding": True}},
        {"scheduler": "EulerAncestralDiscreteScheduler", "seeds": (3, 4)},
        {"preview": True, "reports_progress": True, "guidance_rescale": 0.7},
        {"guidance_end": 0.5},
    ],
    ids=str,
)
def test_no_setting_makes_a_step_wait(changes: dict[str, Any]) -> None:
    found = waits(job(**changes))
    assert not any(found), found


def test_clips_in_windows_do_not_wait() -> None:
    bundle = msgspec.structs.replace(sd15(rows=64), motion=Motion(window=8))
    context = ContextWindow(length=8, stride=2)
    clip = job(bundle=bundle, frames=20, context=context, scheduler="EulerDiscreteScheduler")
    assert len(clip.windows) > 2
    first, *later = waits(clip, bundle)
    assert not any(later), later
    assert not first, first


def test_adapters_that_start_and_end_do_not_wait() -> None:
    bundle = sd15(rows=4, adapters=("plain",))
    found = waits(job(bundle=bundle, adapters=(AdapterOptions(name="plain", start=0.3, end=0.7),)), bundle)
    assert not any(found), found


def test_t2i_adapters_that_end_do_not_wait() -> None:
    adapter = T2IAdapter(name="sketch", channels=1, downscale_factor=8)
    bundle = msgspec.structs.replace(sd15(rows=4), t2i_adapters=(adapter,), features=(Residual(8, 0),))
    (name,) = bundle.feature_names
    parts = [
        T2IFeatures(tensors={name: torch.full((1, 8, 8, 8), value)}, start=0.0, end=end)
        for value, end in ((1.0, 1.0), (2.0, 0.5))
    ]
    asked = job_request(num_inference_steps=4, guidance_scale=1.0)
    inputs = {"encoder_hidden_states": torch.zeros(1, 77, 768)}
    here = Conditioning(asked, bundle, dict(inputs), 1, features=tuple(parts))
    assert [float(here.at(index, 4)[name].unique()) for index in range(4)] == [3, 3, 1, 1]
    assert [float(part.tensors[name].unique()) for part in parts] == [1, 2]
    there = Conditioning(asked, bundle, inputs, 1, features=tuple(parts), device=META)
    with Traffic() as traffic:
        assert {there.at(index, 4)[name].device for index in range(4)} == {META}
    assert not traffic.waits


@pytest.mark.parametrize("name", SCHEDULERS)
def test_noise_level_agrees_with_the_scheduler(name: str) -> None:
    """Before the first step and after each one, because schedulers look it up differently in these states."""
    asked = job_request("inpainting", scheduler=name, num_inference_steps=STEPS)
    scheduler = make_scheduler(sd15(rows=2), asked)
    set_timesteps(scheduler, STEPS)
    generator = torch.Generator().manual_seed(0)
    picture, noise, latents = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(3))
    for index, timestep in enumerate(scheduler.timesteps):
        now = scheduler.timesteps[index : index + 1]
        share, noise_share = noise_level(scheduler, now)
        assert torch.equal(share * picture + noise_share * noise, scheduler.add_noise(picture, noise, now))
        scaled = scheduler.scale_model_input(latents, timestep)
        latents = scheduler.step(scaled * 0.5, timestep, latents, return_dict=False)[0]


@pytest.mark.parametrize("seeds", [(3,), (3, 4)])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_pictures_do_not_change_without_waiting(name: str, seeds: tuple[int, ...], monkeypatch: Any) -> None:
    def finished() -> Tensor:
        one = job(CPU, task="inpainting", scheduler=name, seeds=seeds)
        while not one.done:
            sample, _ = one.model_input()
            one.add_output_rows(sample * 0.5)
        return one.result()

    expected, devices = finished(), []

    def as_on_a_device(device: torch.device) -> Any:
        devices.append(device)
        return without_waiting(META)

    monkeypatch.setattr(job_module, "without_waiting", as_on_a_device)
    assert torch.equal(finished(), expected)
    assert devices
