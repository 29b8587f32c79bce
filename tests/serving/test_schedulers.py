"""Schedulers as diffusers' pipelines have them: each corrects other values of an outdated configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import msgspec
import pytest
from diffusers import (
    ControlNetModel,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)

from imprompt_bench.rig import sd15
from imprompt_serving.denoiser.schedulers import make_scheduler, set_timesteps
from imprompt_serving.job import ControlUse
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
    "control": (StableDiffusionControlNetPipeline, {"controls": (ControlUse(name="depth"),)}),
}


def diffusers_scheduler(pipeline: Any, name: str, config: dict[str, Any]) -> Any:
    """The scheduler of an otherwise empty pipeline."""
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


def test_infinite_values_of_a_configuration_stay(tmp_path: Path) -> None:
    config = OUTDATED | {"lambda_min_clipped": float("-inf")}
    bundle = msgspec.structs.replace(sd15(rows=2), scheduler="DPMSolverMultistepScheduler", scheduler_config=config)
    bundle.save(tmp_path)
    made = make_scheduler(Bundle.load(tmp_path), job_request("text-to-image"))
    assert made.config.lambda_min_clipped == float("-inf")
    set_timesteps(made, 5)


def settings(scheduler: Any) -> dict[str, Any]:
    """Its class, and its configuration without diffusers' own notes."""
    values = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    return {"class": type(scheduler).__name__, **values}
