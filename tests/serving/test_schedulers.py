"""Schedulers as diffusers' pipelines make them, with the corrections of each pipeline to outdated configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import diffusers.schedulers.scheduling_dpmsolver_sde as sde
import msgspec
import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)

from imprompt_bench.rig import sd15
from imprompt_serving.denoiser import schedulers
from imprompt_serving.denoiser.conditioning import Conditioner
from imprompt_serving.denoiser.job import Job
from imprompt_serving.denoiser.schedulers import make_scheduler, set_timesteps
from imprompt_serving.errors import InvalidRequest
from imprompt_serving.job_request import ControlOptions, JobRequest
from imprompt_serving.pipeline.request import parse
from imprompt_serving.scheduler_names import SCHEDULERS
from imprompt_serving.specs import Bundle
from jobs import job_request

OUTDATED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CONFIGS: dict[str, dict[str, Any]] = {
    "not said": OUTDATED,
    "outdated": OUTDATED | {"steps_offset": 0, "clip_sample": True, "skip_prk_steps": False},
    "current": OUTDATED | {"steps_offset": 1, "clip_sample": False, "skip_prk_steps": True},
}
PIPELINES: dict[str, tuple[Any, dict[str, Any]]] = {
    "text-to-image": (StableDiffusionPipeline, {}),
    "image-to-image": (StableDiffusionImg2ImgPipeline, {}),
    "inpainting": (StableDiffusionInpaintPipeline, {}),
    "control": (StableDiffusionControlNetPipeline, {"controls": (ControlOptions(name="depth"),)}),
}


def diffusers_scheduler(pipeline: Any, name: str, config: dict[str, Any]) -> Any:
    """Return the scheduler of an otherwise empty diffusers pipeline."""
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "unet", "safety_checker", "feature_extractor"))
    if pipeline is StableDiffusionControlNetPipeline:
        small = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "norm_num_groups": 1}
        parts |= {"controlnet": ControlNetModel(**small, conditioning_embedding_out_channels=(4,))}
    scheduler = getattr(diffusers, name).from_config(config)
    return pipeline(**parts, scheduler=scheduler, requires_safety_checker=False).scheduler


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("case", PIPELINES)
@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
def test_the_scheduler_of_each_task(name: str, case: str, config: str) -> None:
    pipeline, changes = PIPELINES[case]
    expected = diffusers_scheduler(pipeline, name, CONFIGS[config])
    bundle = msgspec.structs.replace(sd15(rows=2), scheduler=name, scheduler_config=CONFIGS[config])
    task = "text-to-image" if case == "control" else case
    assert settings(make_scheduler(bundle, job_request(task, **changes))) == settings(expected)
    other = make_scheduler(bundle, job_request(task, scheduler="LCMScheduler", **changes))
    assert settings(other) == settings(LCMScheduler.from_config(expected.config))


def test_infinite_values_of_a_configuration_are_kept(tmp_path: Path) -> None:
    config = OUTDATED | {"lambda_min_clipped": float("-inf")}
    bundle = msgspec.structs.replace(sd15(rows=2), scheduler="DPMSolverMultistepScheduler", scheduler_config=config)
    bundle.save(tmp_path)
    made = make_scheduler(Bundle.load(tmp_path), job_request("text-to-image"))
    assert made.config.lambda_min_clipped == float("-inf")
    set_timesteps(made, 5)


def settings(scheduler: Any) -> dict[str, Any]:
    """Return its class, and its configuration without diffusers' private entries."""
    values = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    return {"class": type(scheduler).__name__, **values}


def saved_config(name: str) -> dict[str, Any]:
    """Return `dict(pipe.scheduler.config)` of a scheduler that was made from the configuration of another class."""
    loaded = {**OUTDATED, "_class_name": "DDIMScheduler", "_diffusers_version": "0.6.0", "set_alpha_to_one": False}
    return dict(getattr(diffusers, name).from_config(diffusers.DDIMScheduler.from_config(loaded).config).config)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("other", [None, "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_a_saved_configuration_replaces_the_bundles_own(name: str, other: str | None) -> None:
    """Sent as JSON and parsed by the pipeline, it has the effect of `Class.from_config`, whatever the bundle has."""
    saved = saved_config(name)
    wire = {"prompt": b"a", "scheduler_config": json.dumps(saved).encode()} | (
        {"scheduler": other.encode()} if other else {}
    )
    bundle = msgspec.structs.replace(sd15(rows=2), scheduler_config={"beta_start": 0.5, "beta_schedule": "linear"})
    parsed = parse({key: np.array([value], object) for key, value in wire.items()}, bundle)
    asked = job_request(scheduler=parsed.settings.scheduler, scheduler_config=parsed.settings.scheduler_config)
    asked = msgspec.json.decode(msgspec.json.encode(asked), type=JobRequest)
    assert saved["_class_name"] == name
    kind = getattr(diffusers, other or name)
    made, expected = make_scheduler(bundle, asked), kind.from_config(saved)
    assert settings(made) == {key: settings(expected)[key] for key in settings(made)}
    for one in (made, expected):
        one.set_timesteps(7)
    assert torch.equal(made.timesteps, expected.timesteps)


def test_a_configuration_without_a_class_is_for_the_bundles_own() -> None:
    saved = dict(diffusers.DDIMScheduler(beta_end=0.5).config)
    tensors = {"prompt": b"a", "scheduler_config": json.dumps(saved).encode()}
    parsed = parse({key: np.array([value], object) for key, value in tensors.items()}, sd15(rows=2))
    assert parsed.settings.scheduler is None
    made = make_scheduler(sd15(rows=2), job_request(scheduler_config=parsed.settings.scheduler_config))
    assert settings(made) == settings(diffusers.DDIMScheduler.from_config(saved))


@pytest.mark.parametrize("infinity", [float("-inf"), "-inf", "-Infinity", None])
def test_infinities_of_a_callers_configuration(infinity: Any) -> None:
    asked = job_request(
        scheduler="DPMSolverMultistepScheduler", scheduler_config={"lambda_min_clipped": infinity, "beta_end": 0.01}
    )
    made = make_scheduler(sd15(rows=2), asked)
    assert made.config.lambda_min_clipped == float("-inf")
    assert made.config.beta_end == 0.01
    set_timesteps(made, 5)


def job(scheduler: str | None, config: dict[str, Any], device: str = "cpu", **changes: Any) -> Job:
    """Make a job with the scheduler that a caller chose."""
    bundle = sd15(rows=2)
    asked = job_request(scheduler=scheduler, scheduler_config=config, guidance_scale=1.0, **changes)
    tensors = {
        "prompt_embeds": torch.zeros(max(len(asked.seeds), 1), 77, 768),
        "image_moments": torch.zeros(1, 8, 8, 8),
        "masked_image_moments": torch.zeros(1, 8, 8, 8),
        "mask": torch.ones(1, 1, 8, 8),
    }
    return Job(asked, bundle, Conditioner(bundle, {})(asked, tensors), tensors, torch.device(device))


def run(job: Job) -> torch.Tensor:
    while not job.done:
        sample, _ = job.model_input()
        job.add_output_rows(sample * 0.5)
    return job.latents


@pytest.mark.parametrize(
    ("parameter", "scheduler", "config", "changes"),
    [
        ("scheduler_config", None, {"beta_schedule": "none such"}, {}),
        ("scheduler_config", None, {"beta_start": "abc"}, {}),
        ("scheduler_config", None, {"num_train_timesteps": 0}, {}),
        ("scheduler_config", None, {"trained_betas": []}, {}),
        ("scheduler_config", None, {"trained_betas": ["a"]}, {}),
        ("scheduler_config", None, {"trained_betas": [0.1] * 10}, {}),
        ("scheduler_config", None, {"timestep_spacing": "none such"}, {}),
        ("scheduler_config", None, {"steps_offset": 900}, {}),
        ("scheduler_config", None, {"prediction_type": "none such"}, {}),
        ("scheduler_config", None, {"prediction_type": "none such"}, {"preview": True, "reports_progress": True}),
        ("scheduler_config", None, {"thresholding": True, "dynamic_thresholding_ratio": 5.0}, {}),
        ("scheduler_config", "DPMSolverMultistepScheduler", {"solver_order": 0}, {}),
        ("scheduler_config", "DPMSolverMultistepScheduler", {"solver_order": "abc"}, {}),
        ("scheduler_config", "DPMSolverMultistepScheduler", {"algorithm_type": 5}, {}),
        ("scheduler_config", "DPMSolverMultistepScheduler", {"lambda_min_clipped": "abc"}, {}),
        ("scheduler_config", "UniPCMultistepScheduler", {"disable_corrector": 5}, {}),
        ("scheduler_config", "UniPCMultistepScheduler", {"solver_type": None, "solver_p": 5}, {}),
        ("scheduler_config", "UniPCMultistepScheduler", {"solver_order": 2.5}, {}),
        ("scheduler_config", "EulerDiscreteScheduler", {"sigma_max": "abc", "use_karras_sigmas": True}, {}),
        ("scheduler_config", "EulerDiscreteScheduler", {"interpolation_type": 5}, {}),
        ("scheduler_config", "LCMScheduler", {"original_inference_steps": 0}, {}),
        ("scheduler_config", "LCMScheduler", {"original_inference_steps": 2}, {}),
        ("scheduler_config", "DPMSolverSDEScheduler", {"prediction_type": "sample"}, {}),
        ("scheduler_config", "DPMSolverSDEScheduler", {"beta_end": 5}, {}),  # used to search forever
        ("scheduler_config", "DPMSolverSDEScheduler", {"beta_start": 0, "beta_end": 0}, {}),
        ("scheduler_config", "EulerDiscreteScheduler", {"beta_start": -0.5}, {}),
        ("scheduler_config", "PNDMScheduler", {"trained_betas": [0.1] * 10}, {"task": "image-to-image"}),
        ("scheduler_config", None, {"trained_betas": [0.1] * 10}, {"task": "inpainting", "strength": 0.5}),
        ("scheduler_config", "LCMScheduler", {"_use_default_values": [], "beta_schedule": 7}, {}),
        ("num_inference_steps", "LCMScheduler", {}, {"num_inference_steps": 100}),
        ("num_inference_steps", None, {}, {"num_inference_steps": 1000}),
    ],
    ids=str,
)  # fmt: skip
def test_errors_of_a_scheduler_name_the_callers_parameter(
    parameter: str, scheduler: str | None, config: dict[str, Any], changes: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        run(job(scheduler, config, **changes))
    assert caught.value.parameter == parameter


def test_internal_errors_are_not_blamed_on_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = job(None, {})
    monkeypatch.setattr(broken._scheduler, "step", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(broken)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_seeds_mean_the_same_as_in_torch(name: str) -> None:
    """Seeds may be signed: -1 is 2**64 - 1, and 2**63 + 5 arrives as a negative number."""
    first, second = (run(job(name, {}, seeds=(seed,))) for seed in (-1, 2**64 - 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, run(job(name, {}, seeds=(2**63 + 5 - 2**64,))))


def test_the_seed_of_a_picture_reproduces_it() -> None:
    """Also with `DPMSolverSDEScheduler`, which draws noise at each step with separate seeds."""
    together = run(job("DPMSolverSDEScheduler", {}, seeds=(3, 8)))
    for picture, seed in zip(together, (3, 8), strict=True):
        assert torch.allclose(picture, run(job("DPMSolverSDEScheduler", {}, seeds=(seed,)))[0], atol=1e-5)


def test_noise_is_drawn_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise is the same as in diffusers on the CPU. `meta` tensors replace a GPU."""
    asked: list[torch.Tensor] = []

    class Sampler(sde.BrownianTreeNoiseSampler):
        def __init__(self, x: torch.Tensor, *arguments: Any) -> None:
            asked.append(x)
            super().__init__(x, *arguments)

    monkeypatch.setattr(sde, "BrownianTreeNoiseSampler", Sampler)
    monkeypatch.setattr(schedulers, "BrownianTreeNoiseSampler", Sampler)
    there = job("DPMSolverSDEScheduler", {}, "meta")
    sample, _ = there.model_input()
    there.add_output_rows(sample * 0.5)
    assert there.latents.device.type == "meta"
    assert [x.device.type for x in asked] == ["cpu"]

    here = job("DPMSolverSDEScheduler", {}, seeds=(5,))
    sample = here.latents
    expected = diffusers.DPMSolverSDEScheduler.from_config(sd15(rows=2).scheduler_config, noise_sampler_seed=5)
    expected.register_to_config(steps_offset=1)
    expected.set_timesteps(4)
    for timestep in expected.timesteps:
        sample = expected.step(expected.scale_model_input(sample, timestep) * 0.5, timestep, sample).prev_sample
    assert torch.equal(run(here), sample)


@pytest.mark.parametrize(("steps", "refused"), [(999, False), (1000, True)])
def test_timesteps_beyond_training_are_refused(steps: int, refused: bool) -> None:
    made = make_scheduler(sd15(rows=2), job_request())
    if refused:
        with pytest.raises(ValueError, match="reach timestep 1000 of a model trained on 1000"):
            set_timesteps(made, steps)
    else:
        assert len(set_timesteps(made, steps)) == steps


WITHOUT_NOISE = (
    "DEISMultistepScheduler",
    "DPMSolverSDEScheduler",  # has a separate seed
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_step_gets_the_arguments_that_it_accepts(name: str) -> None:
    made, generator = make_scheduler(sd15(rows=2), job_request(scheduler=name)), torch.Generator()
    expected: dict[str, Any] = {"eta": 0.5} if name in ("DDIMScheduler", "TCDScheduler") else {}
    expected |= {} if name in WITHOUT_NOISE else {"generator": generator}
    assert schedulers.step_arguments(made, eta=0.5, generator=generator) == expected
