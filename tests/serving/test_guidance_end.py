"""Guidance that ends before the last step: the pictures of diffusers' cutoff callbacks, with half the rows."""

from __future__ import annotations

import time
from typing import Any
from unittest.mock import Mock

import diffusers
import msgspec
import numpy as np
import pytest
import torch
from diffusers.callbacks import PipelineCallback, SDCFGCutoffCallback, SDXLCFGCutoffCallback

from imprompt_bench.rig import Rig, sd15
from imprompt_serving.denoiser.job import Job
from imprompt_serving.job_request import AdapterOptions, ContextWindow
from imprompt_serving.specs import Motion
from jobs import job_request
from parity import assert_different, assert_same
from served import Served
from tiny import images, oracle

STATUE, DEPTH = images.photo(1), images.control_image("depth")
SMALL: dict[str, Any] = {
    "prompt": "a photo of a cat",
    "num_inference_steps": 6,
    "guidance_scale": 15.0,  # strong enough that one step more or less changes the picture
    "height": 64,
    "width": 64,
}
SCHEDULER = "DDIMScheduler"


class Cutoff(PipelineCallback):
    """diffusers' cutoff for what its own callbacks lack: several pictures, image prompts, and control images."""

    def __init__(self, ratio: float, *inputs: str) -> None:
        self.inputs = ("prompt_embeds", *inputs)
        super().__init__(cutoff_step_ratio=ratio)

    @property
    def tensor_inputs(self) -> list[str]:
        return list(self.inputs)

    def callback_fn(self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]) -> Any:
        if step_index == int(pipeline.num_timesteps * self.config.cutoff_step_ratio):
            pipeline._guidance_scale = 0.0
            for name, value in callback_kwargs.items():
                if isinstance(value, list):  # the pipeline keeps the list itself
                    value[:] = [embeds.chunk(2)[1] for embeds in value]
                else:
                    callback_kwargs[name] = value.chunk(2)[1]
        return callback_kwargs


def expected(pipe: Any, callback: PipelineCallback, **arguments: Any) -> np.ndarray:
    pipe._callback_tensor_inputs = [*{*pipe._callback_tensor_inputs, *callback.tensor_inputs}]
    return oracle.generate(pipe, callback_on_step_end=callback, **SMALL | arguments)


def generate(served: Served, **arguments: Any) -> Any:
    return served.generate(**SMALL | {"seed": 0, "scheduler": SCHEDULER} | arguments)


@pytest.fixture(scope="module")
def plain(served: Any) -> Any:
    """Load diffusers with the plain adapter."""
    made = served("sd15").bundle
    pipe = oracle.pipeline(made.checkpoints / "base", made.adapters[:1], scheduler=SCHEDULER)
    pipe.set_ip_adapter_scale(0.6)
    return pipe


@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.9])
def test_same_picture_as_diffusers_cutoff(sd15: Served, ratio: float) -> None:
    pipe = oracle.pipeline(sd15.bundle.checkpoints / "base", scheduler=SCHEDULER)
    result = generate(sd15, guidance_end=ratio)
    assert_same(result, expected(pipe, SDCFGCutoffCallback(cutoff_step_ratio=ratio)))
    if ratio < 0.5:
        assert_different(result, generate(sd15))


@pytest.mark.parametrize("arguments", [{}, {"num_images_per_prompt": 2}, {"guidance_rescale": 0.7}], ids=str)
def test_same_picture_with_an_image_prompt(sd15: Served, plain: Any, arguments: dict[str, Any]) -> None:
    result = generate(sd15, guidance_end=0.5, ip_adapter_image={"plain": STATUE}, ip_adapter_scale=0.6, **arguments)
    pictures = expected(plain, Cutoff(0.5, "image_embeds"), ip_adapter_image=STATUE, **arguments)
    assert_same(result, pictures)


def test_guidance_covers_all_steps_by_default(sd15: Served) -> None:
    assert_same(generate(sd15, guidance_end=1.0), oracle.as_array(generate(sd15).images))


def test_rows_halve_where_guidance_ends(sd15: Served) -> None:
    names = [f'imprompt_tick_rows_{kind}{{model="sd15_denoiser"}}' for kind in ("count", "sum")]
    time.sleep(0.3)  # a separate thread reports the metrics
    before = sd15.metrics()
    generate(sd15, guidance_end=0.5)
    time.sleep(0.3)
    after = sd15.metrics()
    assert [after[name] - before[name] for name in names] == [6, 4 * 2 + 2 * 1]


@pytest.mark.parametrize("guess_mode", [False, True])
def test_same_picture_with_a_controlnet(served: Any, guess_mode: bool) -> None:
    control: Served = served("control")
    net = diffusers.ControlNetModel.from_pretrained(control.bundle.checkpoints / "depth")
    pipe = control.bundle.oracle(diffusers.StableDiffusionControlNetPipeline, scheduler=SCHEDULER, controlnet=net)
    pipe.set_ip_adapter_scale(0.6)
    arguments: dict[str, Any] = {"ip_adapter_image": STATUE, "guess_mode": guess_mode}
    inputs = ("image_embeds",) if guess_mode else ("image_embeds", "image")
    pictures = expected(pipe, Cutoff(0.5, *inputs), image=DEPTH, **arguments)
    result = generate(
        control, guidance_end=0.5, control_image=DEPTH, controlnet="depth", ip_adapter_scale=0.6, **arguments
    )
    assert_same(result, pictures)


def test_same_picture_with_sdxl(served: Any) -> None:
    sdxl: Served = served("sdxl")
    pipe = oracle.pipeline(sdxl.bundle.checkpoints / "base", (), diffusers.StableDiffusionXLPipeline)
    pictures = expected(pipe, SDXLCFGCutoffCallback(cutoff_step_ratio=0.0))
    result = generate(sdxl, guidance_end=0.0, scheduler=None)
    assert_same(result, pictures)
    assert_different(result, generate(sdxl, scheduler=None))


def conditioning_rows(job: Job) -> list[int]:
    return [row for block in job.blocks(0, job.rows) for row in block.conditioning]


def test_the_remaining_rows_are_the_conditional_ones() -> None:
    job = Rig(sd15(rows=4), Mock()).job("job", steps=4, size=64, guidance_end=0.25)
    rows = []
    while not job.done:
        rows.append(conditioning_rows(job))
        job.add_output_rows(torch.zeros(job.rows, *job.latents.shape[1:]))
    assert rows == [[0, 1], [0, 1], [1], [1]]


def test_windows_of_clips_have_the_same_rows() -> None:
    bundle = msgspec.structs.replace(sd15(rows=4), motion=Motion(window=16))
    rig = Rig(bundle, Mock())
    tensors = rig.embeddings(0)
    request = job_request(
        num_inference_steps=2,
        guidance_end=0.0,
        frames=20,
        context=ContextWindow(length=16),
        adapters=tuple(AdapterOptions(name=adapter.name) for adapter in bundle.adapters),
    )
    job = Job(request, bundle, rig._conditioner(request, tensors), tensors)
    assert len(job.windows) > 1
    assert conditioning_rows(job) == [0, 1] * len(job.windows)
    job.add_output_rows(torch.zeros(job.rows, *job.latents.shape[1:2], job.frames, *job.latents.shape[3:]))
    assert conditioning_rows(job) == [1] * len(job.windows)
    latents, timesteps = job.model_input()
    assert len(latents) == len(timesteps) == job.rows == len(job.windows)
