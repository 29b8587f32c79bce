"""Initial latents: drawn in the order of diffusers' pipelines, one task at a time, without engines."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from torch import Tensor

from imprompt_bench.rig import sd15
from imprompt_serving.denoiser.initial_latents import InitialLatents, generators, make_initial_latents
from imprompt_serving.errors import InvalidRequest
from imprompt_serving.specs import Bundle
from jobs import job_request

BUNDLE = sd15(rows=4)
FACTOR = BUNDLE.vae_scaling_factor
SIZE = (8, 8)
STEPS = 5
NORMAL = torch.Generator().manual_seed(5)
MOMENTS = torch.randn(1, 8, *SIZE, generator=NORMAL)
MASKED = torch.randn(1, 8, *SIZE, generator=NORMAL)
VIDEO = torch.randn(3, 8, *SIZE, generator=NORMAL)
MASK = (torch.randn(1, 1, *SIZE, generator=NORMAL) > 0).float()


def make(task: str, pictures: int, bundle: Bundle = BUNDLE, cls: Any = DDIMScheduler, **changes: Any) -> InitialLatents:
    request = job_request(task, **{"num_inference_steps": STEPS, "strength": 0.6, **changes})
    tensors = {"image_moments": MOMENTS, "masked_image_moments": MASKED, "mask": MASK}
    if request.frames is not None:
        tensors["image_moments"] = VIDEO
    return make_initial_latents(request, bundle, tensors, scheduler(cls), generators(request.seeds), pictures=pictures)


def scheduler(cls: Any = DDIMScheduler) -> Any:
    made = cls()
    made.set_timesteps(STEPS)
    return made


def noise(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*(shape or (1, 4, *SIZE)), generator=generator)


def sample(moments: Tensor, drawn: Tensor) -> Tensor:
    mean, log_variance = moments.chunk(2, dim=1)
    return mean + torch.exp(0.5 * log_variance) * drawn


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_text_to_image_starts_from_noise_at_the_level_of_the_scheduler() -> None:
    found = make("text-to-image", 2, cls=EulerDiscreteScheduler, seeds=(3, 4))
    expected = torch.cat([noise(one) for one in seeded(3, 4)]) * scheduler(EulerDiscreteScheduler).init_noise_sigma
    torch.testing.assert_close(found.latents, expected)
    assert (found.steps, len(found.timesteps)) == (STEPS, STEPS)
    assert found.blend is None
    assert found.channels is None


def test_one_seed_draws_the_noise_of_all_pictures() -> None:
    found = make("text-to-image", 2, seeds=(3,))
    torch.testing.assert_close(found.latents, noise(*seeded(3), 2, 4, *SIZE))


@pytest.mark.parametrize("seeds", [(3,), (3, 4)])
def test_image_to_image_adds_noise_to_the_sampled_picture(seeds: tuple[int, ...]) -> None:
    """The VAE's noise comes first: once with one seed, and for each picture with several."""
    found = make("image-to-image", 2, seeds=seeds)
    drawn = seeded(*seeds)
    latents = torch.cat([sample(MOMENTS, noise(one)) for one in drawn]) * FACTOR
    latents = latents.expand(2, -1, -1, -1)
    later = noise(*drawn, 2, 4, *SIZE) if len(drawn) == 1 else torch.cat([noise(one) for one in drawn])
    timesteps = scheduler().timesteps[2:]
    torch.testing.assert_close(found.latents, scheduler().add_noise(latents, later, timesteps[:1].repeat(2)))
    assert found.timesteps.tolist() == timesteps.tolist()
    assert found.steps == 3


def test_a_refiner_continues_with_the_latents_of_its_base() -> None:
    found = make("image-to-image", 2, seeds=(3,), denoising_start=0.6)
    expected = sample(MOMENTS, noise(*seeded(3))) * FACTOR
    torch.testing.assert_close(found.latents, expected.expand(2, -1, -1, -1))


@pytest.mark.parametrize(("start", "steps"), [(0.2, 4), (0.4, 3), (0.6, 2), (0.8, 1)])
def test_a_refiner_takes_the_steps_after_its_start(start: float, steps: int) -> None:
    found = make("image-to-image", 1, denoising_start=start)
    assert found.steps == steps
    assert found.timesteps.tolist() == scheduler().timesteps[-steps:].tolist()


def test_a_refiner_does_not_start_in_the_middle_of_a_step() -> None:
    """Heun calls the UNet twice per step, except for the last one."""
    found = make("image-to-image", 1, cls=HeunDiscreteScheduler, denoising_start=0.6)
    assert found.steps == 3
    assert found.timesteps.tolist() == scheduler(HeunDiscreteScheduler).timesteps[-5:].tolist()


@pytest.mark.parametrize("seeds", [(3,), (3, 4)])
def test_video_to_video_gives_each_clip_its_own_noise(seeds: tuple[int, ...]) -> None:
    found = make("image-to-image", 2, seeds=seeds, frames=3)
    drawn = seeded(*seeds)
    latents = torch.stack([sample(VIDEO, noise(one, 3, 4, *SIZE)) for one in drawn]) * FACTOR
    latents = latents.expand(2, -1, -1, -1, -1)
    shape = (3, 4, *SIZE)
    later = noise(*drawn, 2, *shape) if len(drawn) == 1 else torch.stack([noise(one, *shape) for one in drawn])
    expected = scheduler().add_noise(latents, later, scheduler().timesteps[2:3].repeat(2)).transpose(1, 2)
    torch.testing.assert_close(found.latents, expected)


def test_text_to_video_has_an_axis_of_frames() -> None:
    found = make("text-to-image", 2, seeds=(3,), frames=3)
    torch.testing.assert_close(found.latents, noise(*seeded(3), 2, 4, 3, *SIZE))


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_keeps_what_later_steps_blend_in(strength: float) -> None:
    """With strength 1, the latents are pure noise, but the picture is still sampled first."""
    found = make("inpainting", 2, seeds=(3,), strength=strength)
    (drawn,) = seeded(3)
    image = (sample(MOMENTS, noise(drawn)) * FACTOR).expand(2, -1, -1, -1)
    later = noise(drawn, 2, 4, *SIZE)
    noised = scheduler().add_noise(image, later, scheduler().timesteps[2:3].repeat(2))
    torch.testing.assert_close(found.latents, later if strength == 1.0 else noised)
    assert found.blend is not None
    for part, expected in zip(found.blend, (later, image, MASK.expand(2, -1, -1, -1)), strict=True):
        torch.testing.assert_close(part, expected)
    assert found.channels is None


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_unets_take_mask_and_masked_picture(strength: float) -> None:
    """With strength 1, they do not need the picture, so it is not sampled."""
    found = make("inpainting", 2, msgspec.structs.replace(BUNDLE, unet_channels=9), seeds=(3,), strength=strength)
    (drawn,) = seeded(3)
    image = (sample(MOMENTS, noise(drawn)) * FACTOR).expand(2, -1, -1, -1) if strength < 1 else None
    later = noise(drawn, 2, 4, *SIZE)
    masked = sample(MASKED, noise(drawn)) * FACTOR
    expected = torch.cat([MASK, masked], dim=1).expand(2, -1, -1, -1)
    assert found.channels is not None
    torch.testing.assert_close(found.channels, expected)
    assert found.blend is None
    if image is None:
        torch.testing.assert_close(found.latents, later)


@pytest.mark.parametrize(("strength", "steps"), [(1.0, 5), (0.99, 4), (0.5, 2), (0.2, 1)])
def test_strength_keeps_the_last_steps(strength: float, steps: int) -> None:
    """Heun calls the UNet twice per step, except for the last one."""
    found = make("image-to-image", 1, cls=HeunDiscreteScheduler, strength=strength)
    assert found.steps == steps
    assert found.timesteps.tolist() == scheduler(HeunDiscreteScheduler).timesteps[2 * (STEPS - steps) :].tolist()


def test_strength_that_leaves_no_step_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"num_inference_steps: strength 0\.1 leaves none of 5 steps"):
        make("image-to-image", 1, strength=0.1)
