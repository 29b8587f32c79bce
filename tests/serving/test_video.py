"""Clips on a running Triton that also serves pictures: the same frames as diffusers' AnimateDiff pipelines."""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import pytest
from diffusers import ControlNetModel, MotionAdapter
from PIL import Image

from imprompt import InvalidRequest, Progress, Result
from parity import MAX_LEVELS, MEAN_LEVELS, NOTICEABLE, assert_different, assert_same
from served import Served
from tiny import images, oracle

STATUE = images.photo(1)
PROMPT = "a photo of a cat"
GUIDE = {"clip_sample": False, "timestep_spacing": "linspace", "beta_schedule": "linear", "steps_offset": 1}
"""Scheduler options in the video example of diffusers' IP-Adapter guide."""
FRAMES = 6
RELIEFS = [images.control_image("depth", index) for index in range(FRAMES)]


@pytest.fixture
def control(served: Callable[[str], Served]) -> Served:
    return served("control")


@cache
def pipeline(served: Served, cls: str, nets: tuple[str, ...] = ()) -> Any:
    """Load a diffusers pipeline from the bundle's checkpoints, with the scheduler of the guide."""
    components: dict[str, Any] = {"motion_adapter": MotionAdapter.from_pretrained(served.bundle.checkpoints / "motion")}
    loaded = [ControlNetModel.from_pretrained(served.bundle.checkpoints / net) for net in nets]
    if loaded:
        components["controlnet"] = loaded if len(loaded) > 1 else loaded[0]
    return served.bundle.oracle(
        getattr(diffusers, cls), scheduler="DDIMScheduler", scheduler_config=GUIDE, **components
    )


def frames(result: Any) -> Any:
    return np.stack([oracle.as_array(clip) for clip in result.frames])


def assert_same_clip(result: Any, expected: Any) -> None:
    largest, mean = oracle.picture_distance(frames(result), expected)
    assert largest <= MAX_LEVELS, f"frames differ by {largest} levels (mean {mean:.3f})"
    assert mean <= MEAN_LEVELS


def assert_other_clip(result: Any, other: Any) -> None:
    assert oracle.picture_distance(frames(result), other)[1] >= NOTICEABLE


def both(served: Served, cls: str, nets: tuple[str, ...] = (), **arguments: Any) -> tuple[Any, Any]:
    """Generate a clip with the server and with diffusers. `control_image` lists all frames of each net in turn."""
    pipe = pipeline(served, cls, nets)
    pipe.set_ip_adapter_scale(0.6)
    arguments = {"prompt": PROMPT, "num_inference_steps": 3, "ip_adapter_image": STATUE, **arguments}
    theirs = dict(arguments)
    if nets:
        pictures = theirs.pop("control_image")
        by_net = [pictures[index * FRAMES : (index + 1) * FRAMES] for index in range(len(nets))]
        theirs["conditioning_frames"] = by_net if len(nets) > 1 else by_net[0]
        arguments["controlnet"] = list(nets)
    expected = oracle.generate(pipe, **theirs)
    return generate(served, **{"seed": 0, **arguments}), expected


def generate(served: Served, **arguments: Any) -> Any:
    common = {"prompt": PROMPT, "num_inference_steps": 3, "scheduler": "DDIMScheduler", "scheduler_config": GUIDE}
    if "ip_adapter_image" in arguments:
        common["ip_adapter_scale"] = 0.6
    return served.generate(**{**common, **arguments})


def test_text_to_video_with_an_image_prompt(control: Served) -> None:
    result, expected = both(control, "AnimateDiffPipeline", num_frames=FRAMES)
    assert frames(result).shape == (1, FRAMES, 64, 64, 3)
    assert result.images == []
    assert_same_clip(result, expected)
    other = generate(control, num_frames=FRAMES, ip_adapter_image=images.photo(2), seed=0)
    assert_other_clip(result, frames(other))


def test_frames_depend_on_each_other(control: Served) -> None:
    """Motion modules mix frames: if the last frames of the video change, so do the first frames of the result."""
    arguments: dict[str, Any] = {"seed": 0, "strength": 0.6, "num_inference_steps": 4}
    video = images.video(FRAMES)
    one = generate(control, video=video, **arguments)
    other = generate(control, video=[*video[:3], *images.video(3, seed=5)], **arguments)
    assert_other_clip(one, frames(other))
    assert oracle.picture_distance(frames(one)[:, :3], frames(other)[:, :3])[1] >= NOTICEABLE / 3


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"num_frames": 16, "num_inference_steps": 2}, id="16 frames"),
        pytest.param({"num_frames": 1}, id="a single frame"),
        pytest.param({"num_frames": 3, "height": 48, "width": 72}, id="not square"),
        pytest.param({"num_frames": 3, "guidance_scale": 1.0}, id="no guidance"),
        pytest.param({"num_frames": 3, "prompt": [PROMPT, "a red house"], "seed": [3, 4]}, id="two prompts"),
        pytest.param({"num_frames": 3, "eta": 0.5}, id="eta"),
    ],
)
def test_text_to_video(control: Served, arguments: dict[str, Any]) -> None:
    assert_same_clip(*both(control, "AnimateDiffPipeline", **arguments))


def test_scheduler_options_matter(control: Served) -> None:
    result = generate(control, num_frames=2, seed=0)
    assert_other_clip(result, frames(generate(control, num_frames=2, seed=0, scheduler_config={"clip_sample": False})))


@pytest.mark.parametrize("strength", [0.5, None])
def test_video_to_video(control: Served, strength: float | None) -> None:
    arguments: dict[str, Any] = {"video": images.video(FRAMES), "num_inference_steps": 4}
    if strength is not None:
        arguments["strength"] = strength
    result, expected = both(control, "AnimateDiffVideoToVideoPipeline", **arguments)
    assert_same_clip(result, expected)
    other = generate(control, **arguments | {"video": images.video(FRAMES, seed=5)}, ip_adapter_image=STATUE, seed=0)
    assert_other_clip(result, frames(other))


def test_controlnet_on_frames(control: Served) -> None:
    arguments: dict[str, Any] = {"num_frames": FRAMES, "control_image": RELIEFS}
    result, expected = both(control, "AnimateDiffControlNetPipeline", ("depth",), **arguments)
    assert_same_clip(result, expected)
    turned = generate(control, **arguments | {"control_image": RELIEFS[::-1]}, controlnet="depth",
                      ip_adapter_image=STATUE, seed=0)  # fmt: skip
    assert_other_clip(result, frames(turned))


def test_two_controlnets_on_frames(control: Served) -> None:
    edges = [images.control_image("canny", index) for index in range(FRAMES)]
    window: dict[str, Any] = {"control_guidance_start": [0.0, 0.3], "controlnet_conditioning_scale": [0.7, 1.0]}
    both_nets = ("depth", "canny")
    arguments = {"num_frames": FRAMES, "control_image": RELIEFS + edges, **window}
    assert_same_clip(*both(control, "AnimateDiffControlNetPipeline", both_nets, **arguments))


def test_controlnet_with_video_to_video(control: Served) -> None:
    arguments = {"video": images.video(FRAMES), "control_image": RELIEFS, "strength": 0.7}
    assert_same_clip(*both(control, "AnimateDiffVideoToVideoControlNetPipeline", ("depth",), **arguments))


def test_window_has_no_effect_on_shorter_clips(control: Served) -> None:
    arguments: dict[str, Any] = {"num_frames": FRAMES, "seed": 0}
    alone = generate(control, **arguments)
    windowed = generate(control, context_length=FRAMES, context_overlap=2, **arguments)
    assert_same_clip(windowed, frames(alone))


def test_clip_longer_than_the_window_is_smooth(control: Served) -> None:
    """It has all frames, each as close to its neighbors as in a clip of one window, and no visible noise."""
    short = frames(generate(control, num_frames=16, seed=0))[0]
    long = frames(generate(control, num_frames=40, seed=0))[0]
    assert len(long) == 40
    assert all(frame.std() > 0.5 * short.std() for frame in long)
    assert _largest_jump(long) < 2 * _largest_jump(short)


def _largest_jump(clip: Any) -> float:
    return max(float(np.abs(a.astype(float) - b).mean()) for a, b in pairwise(clip))


def test_windows_use_the_control_images_of_their_frames(control: Served) -> None:
    """One image equals that image for every frame; other images in the second half change mainly the last frames."""
    still = [RELIEFS[0]] * 20
    common: dict[str, Any] = {"controlnet": "depth", "num_frames": 20, "seed": 0, "context_length": 8}
    one = generate(control, control_image=RELIEFS[0], **common)
    each = generate(control, control_image=still, **common)
    assert_same_clip(each, frames(one))
    half = generate(control, control_image=[*still[:10], *[images.control_image("canny")] * 10], **common)
    changed = np.abs(frames(half)[0].astype(float) - frames(one)[0]).mean(axis=(1, 2, 3))
    assert changed[-4:].mean() > 2 * changed[:4].mean()


def test_pictures_and_clips_at_the_same_time(control: Served) -> None:
    requests: list[dict[str, Any]] = [
        {"seed": 1, "num_frames": FRAMES},
        {"seed": 2},
        {"seed": 3, "num_frames": FRAMES, "control_image": RELIEFS, "controlnet": "canny"},
        {"seed": 4, "control_image": RELIEFS[0], "controlnet": "depth"},
        {"seed": 5, "num_frames": 12, "context_length": 8},
    ]
    alone = [generate(control, **request) for request in requests]
    with ThreadPoolExecutor(len(requests)) as threads:
        together = list(threads.map(lambda request: generate(control, **request), requests))
    for one, other in zip(together, alone, strict=True):
        if one.frames is None:
            assert_same(one, oracle.as_array(other.images))
        else:
            assert_same_clip(one, frames(other))
    assert_different(together[1], together[3])


def test_latents_of_a_clip(control: Served) -> None:
    result = generate(control, num_frames=3, seed=0, output_type="latent")
    assert result.latents is not None
    assert result.latents.shape == (1, 4, 3, 8, 8)


def test_progress_with_previews(control: Served) -> None:
    arguments: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 3, "num_frames": 3, "preview": True}
    *steps, result = control.client.stream(model="control", **arguments)
    assert [step.step for step in steps if isinstance(step, Progress)] == [1, 2, 3]
    assert all(isinstance(step, Progress) and step.preview is not None for step in steps[:-1])
    assert isinstance(result, Result)
    assert result.frames is not None


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_clips_as_encoded_files(control: Served, kind: str) -> None:
    raw = generate(control, num_frames=3, seed=0)
    result = generate(control, num_frames=3, seed=0, output_format=kind)
    assert result.encoded is not None
    assert Image.open(io.BytesIO(result.encoded[0])).format == kind.upper()
    assert frames(result).shape == frames(raw).shape
    # Both formats are lossy; GIF loses most of the colors.
    assert np.abs(frames(result).astype(float) - frames(raw)).mean() < 40


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_pictures_as_encoded_files(control: Served, kind: str) -> None:
    raw = generate(control, seed=0, num_images_per_prompt=2)
    result = generate(control, seed=0, num_images_per_prompt=2, output_format=kind)
    assert [Image.open(io.BytesIO(data)).format for data in result.encoded] == [kind.upper()] * 2
    difference = oracle.as_array(result.images).astype(float) - oracle.as_array(raw.images)
    assert np.abs(difference).mean() <= (0 if kind == "png" else 20)


@pytest.mark.parametrize(
    ("parameter", "arguments"),
    [
        ("output_format", {"num_frames": 2, "output_format": "png"}),
        ("output_format", {"output_format": "gif"}),
        ("output_format", {"output_format": "png", "output_type": "latent"}),
        ("num_frames", {"num_frames": 65}),
        ("num_frames", {"num_frames": 0}),
        ("video", {"video": images.video(3), "num_frames": 4}),
        ("video", {"video": images.video(65)}),
        ("image", {"image": STATUE, "num_frames": 4}),
        ("strength", {"strength": 0.5, "num_frames": 4}),
        ("control_image", {"control_image": RELIEFS[:3], "controlnet": "depth", "num_frames": 4}),
        ("context_length", {"num_frames": 40, "context_length": 33}),
        ("context_overlap", {"num_frames": 40, "context_length": 8, "context_overlap": 8}),
        ("context_stride", {"num_frames": 40, "context_stride": 0}),
        ("context_length", {"context_length": 8}),
        ("num_images_per_prompt", {"num_frames": 64, "num_images_per_prompt": 5}),
    ],
)
def test_refusals_of_clips_name_the_parameter(control: Served, parameter: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        control.generate(prompt=PROMPT, num_inference_steps=1, **arguments)
    assert caught.value.parameter == parameter, caught.value
