"""Previews: clean latents are right with every scheduler, and become small pictures."""

from __future__ import annotations

import io

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from imprompt_bench.rig import sd15
from imprompt_serving.denoiser.preview import LONGEST_SIDE, predicted_latents, previews
from imprompt_serving.denoiser.schedulers import make_scheduler, set_timesteps
from imprompt_serving.scheduler_names import SCHEDULERS
from jobs import job_request

SD15 = sd15(rows=2)
CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_clean_latents_from_a_perfect_prediction(name: str, prediction: str) -> None:
    """With every scheduler, a perfect prediction gives back the latents before noise was added."""
    config = {**CONFIG, "prediction_type": prediction}
    bundle = msgspec.structs.replace(sd15(rows=2), scheduler=name, scheduler_config=config)
    scheduler = make_scheduler(bundle, job_request())
    set_timesteps(scheduler, 6)
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))
    timestep = scheduler.timesteps[2]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(2)
    model_input = scheduler.scale_model_input(scheduler.add_noise(clean, noise, timestep[None]), timestep)
    alpha = scheduler.alphas_cumprod[timestep.round().long()]
    output = noise if prediction == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
    predicted = predicted_latents(scheduler, timestep, model_input, output)
    # Fractional timesteps (Karras-like spacing) are rounded, which is close enough for a preview.
    assert (predicted - clean).abs().mean() < 0.02


@pytest.mark.parametrize(
    ("size", "expected"), [((8, 8), (64, 64)), ((64, 64), (256, 256)), ((32, 96), (256, 85)), ((64, 48), (192, 256))]
)
def test_size_of_previews(size: tuple[int, int], expected: tuple[int, int]) -> None:
    """Sizes of latents [h, w], and the expected width and height."""
    (data,) = previews(torch.zeros(1, 4, *size), SD15)
    image = Image.open(io.BytesIO(data))
    assert image.format == "JPEG"
    assert image.size == expected
    assert max(image.size) <= LONGEST_SIDE


def test_bright_latents_give_bright_previews() -> None:
    levels = []
    for value in (-3.0, 0.0, 3.0):
        latents = torch.zeros(1, 4, 8, 8)
        latents[:, 0] = value
        levels.append(np.asarray(Image.open(io.BytesIO(previews(latents, SD15)[0]))).mean())
    assert levels[0] < levels[1] - 50
    assert levels[1] < levels[2] - 50


def test_a_clip_shows_its_first_frame() -> None:
    clip = torch.randn(2, 4, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    assert previews(clip, SD15) == previews(clip[:, :, 0], SD15)


def test_latents_that_are_nan_still_give_a_preview() -> None:
    assert len(previews(torch.full((1, 4, 8, 8), float("nan")), SD15)) == 1
