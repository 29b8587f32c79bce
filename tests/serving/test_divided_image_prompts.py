"""Different image prompts for each prompt of a request, and for each frame of a clip: the same as diffusers.

diffusers is called once per prompt, because it gives all embeddings to all prompts. Its motion UNets repeat image
tokens for all frames; here they keep those of each frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AnimateDiffPipeline, MotionAdapter
from diffusers.image_processor import IPAdapterMaskProcessor

from imprompt import InvalidRequest
from parity import MAX_LEVELS, MEAN_LEVELS, NOTICEABLE, assert_different, assert_same
from served import Served
from tiny import images, oracle

PHOTOS = images.photos(6, seed=70)
PROMPTS = ["a photo of a cat", "a red house"]
SMALL: dict[str, Any] = {"prompt": PROMPTS, "num_inference_steps": 4, "height": 64, "width": 64}
FRAMES = 6
CLIP: dict[str, Any] = {"prompt": PROMPTS[0], "num_inference_steps": 3, "num_frames": FRAMES}
LEFT, RIGHT = images.mask("left"), images.mask("right")


def pictures(result: Any) -> np.ndarray:
    return np.stack([np.asarray(image) for image in result.images])


@pytest.fixture(scope="module")
def pipe(served: Callable[[str], Served]) -> Any:
    """A diffusers pipeline with the named adapters of `sd15`, in that order."""
    made = served("sd15").bundle
    by_name = dict(zip(("plain", "plus", "full_face"), made.adapters, strict=True))

    @cache
    def load(*names: str) -> Any:
        loaded = oracle.pipeline(made.checkpoints / "base", [by_name[name] for name in names])
        loaded.set_ip_adapter_scale([0.6] * len(names))
        return loaded

    return load


def one_by_one(pipe: Any, images_by_prompt: Sequence[Any], seeds: Sequence[int], **arguments: Any) -> np.ndarray:
    """Call diffusers once per prompt."""
    common = {**SMALL, **arguments}
    calls = zip(PROMPTS, images_by_prompt, seeds, strict=True)
    return np.concatenate(
        [oracle.generate(pipe, **{**common, "prompt": p}, ip_adapter_image=image, seed=s) for p, image, s in calls]
    )


@pytest.mark.parametrize("adapter", ["plain", "plus"])
@pytest.mark.parametrize("count", [1, 2])
def test_pictures_per_prompt(sd15: Served, pipe: Any, adapter: str, count: int) -> None:
    photos = PHOTOS[: 2 * count]
    given = {**SMALL, "ip_adapter_scale": 0.6, "ip_adapter_image_per": "prompt", "seed": [3, 4]}
    result = sd15.generate(**given, ip_adapter_image={adapter: photos})
    assert_same(result, one_by_one(pipe(adapter), [[photos[:count]], [photos[count:]]], [3, 4]))
    swapped = sd15.generate(**given, ip_adapter_image={adapter: photos[count:] + photos[:count]})
    assert_different(result, swapped)
    shared = sd15.generate(**{**given, "ip_adapter_image_per": "request"}, ip_adapter_image={adapter: photos})
    assert_different(result, shared)


def test_embeddings_per_prompt(sd15: Served) -> None:
    embeds = sd15.client.encode_image(model="sd15", adapter="plain", images=PHOTOS[:2])
    given = {**SMALL, "ip_adapter_image_per": "prompt", "seed": [3, 4]}
    expected = sd15.generate(**given, ip_adapter_image={"plain": PHOTOS[:2]})
    assert_same(sd15.generate(**given, ip_adapter_image_embeds={"plain": embeds}), pictures(expected))


def test_all_results_of_a_prompt_have_its_pictures(sd15: Served, pipe: Any) -> None:
    given = {
        **SMALL,
        "ip_adapter_scale": 0.6,
        "ip_adapter_image": {"plain": PHOTOS[:2]},
        "ip_adapter_image_per": "prompt",
    }
    result = sd15.generate(**given, num_images_per_prompt=2, seed=[3, 4, 5, 6])
    expected = [one_by_one(pipe("plain"), PHOTOS[:2], seeds) for seeds in ([3, 5], [4, 6])]
    assert_same(result, np.stack(expected, axis=1).reshape(4, 64, 64, 3))


def test_one_adapter_per_prompt_and_another_for_all(sd15: Served, pipe: Any) -> None:
    given = {**SMALL, "ip_adapter_scale": 0.6, "seed": [3, 4]}
    photos = {"plain": PHOTOS[:2], "plus": PHOTOS[2:4]}
    result = sd15.generate(
        **given, ip_adapter_image=photos, ip_adapter_image_per={"plain": "prompt", "plus": "request"}
    )
    theirs = [[PHOTOS[0], PHOTOS[2:4]], [PHOTOS[1], PHOTOS[2:4]]]
    assert_same(result, one_by_one(pipe("plain", "plus"), theirs, [3, 4]))
    assert_different(result, sd15.generate(**given, ip_adapter_image=photos, ip_adapter_image_per="prompt"))


def prepared(masks: Sequence[Any]) -> torch.Tensor:
    return IPAdapterMaskProcessor().preprocess(list(masks), height=64, width=64)


@pytest.mark.parametrize("per", ["request", "prompt"])
def test_masks_per_prompt(sd15: Served, pipe: Any, per: str) -> None:
    """The first prompt has its two pictures left and right, the second right and left."""
    photos = PHOTOS[: 4 if per == "prompt" else 2]
    masks = [LEFT, RIGHT, RIGHT, LEFT]
    given = {**SMALL, "ip_adapter_scale": [[0.7, 0.5]], "ip_adapter_image": {"plain": photos}, "seed": [3, 4]}
    result = sd15.generate(**given, ip_adapter_image_per=per, ip_adapter_masks={"plain": masks})
    loaded = pipe("plain")
    loaded.set_ip_adapter_scale([[0.7, 0.5]])
    expected = [
        oracle.generate(
            loaded,
            **{**SMALL, "prompt": prompt},
            ip_adapter_image=[photos[-2:] if index else photos[:2]],
            cross_attention_kwargs={"ip_adapter_masks": [prepared(masks[2 * index : 2 * index + 2]).transpose(0, 1)]},
            seed=3 + index,
        )
        for index, prompt in enumerate(PROMPTS)
    ]
    loaded.set_ip_adapter_scale(0.6)
    assert_same(result, np.concatenate(expected))
    assert_different(result, sd15.generate(**given, ip_adapter_image_per=per, ip_adapter_masks={"plain": masks[:2]}))


@pytest.fixture
def control(served: Callable[[str], Served]) -> Served:
    return served("control")


@cache
def animate(served: Served) -> Any:
    adapter = MotionAdapter.from_pretrained(served.bundle.checkpoints / "motion")
    loaded = served.bundle.oracle(AnimateDiffPipeline, scheduler="DDIMScheduler", motion_adapter=adapter)
    loaded.set_ip_adapter_scale(0.6)
    return loaded


class PerFrame(torch.Tensor):
    """Image tokens of each frame, which the motion UNet need not repeat."""

    def repeat_interleave(self, *_: Any, **__: Any) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


@contextmanager
def tokens_per_frame(pipe: Any, keyframes: Sequence[int]) -> Iterator[None]:
    """Interpolate the image tokens of keyframes, as FreeNoise does with prompts, and pass them frame by frame."""

    def by_frame(tokens: torch.Tensor) -> torch.Tensor:
        filled = torch.zeros(FRAMES, *tokens.shape[1:])
        frames, tokens = [*keyframes, FRAMES - 1], torch.cat([tokens, tokens[-1:]])
        for index, (start, end) in enumerate(pairwise(frames)):
            steps = torch.linspace(0, 1, end - start + 1).view(-1, *[1] * (tokens.ndim - 1))
            filled[start : end + 1] = (1 - steps) * tokens[index] + steps * tokens[index + 1]
        return filled

    def hook(_: Any, __: Any, projected: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.cat([by_frame(half) for half in each.chunk(2)]).as_subclass(PerFrame) for each in projected]

    handle = pipe.unet.encoder_hid_proj.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def frames(result: Any) -> np.ndarray:
    return np.stack([oracle.as_array(clip) for clip in result.frames])


def assert_same_clip(result: Any, expected: np.ndarray) -> None:
    largest, mean = oracle.picture_distance(frames(result), expected)
    assert largest <= MAX_LEVELS, f"frames differ by {largest} levels (mean {mean:.3f})"
    assert mean <= MEAN_LEVELS


def assert_other_clip(result: Any, other: Any) -> None:
    assert oracle.picture_distance(frames(result), frames(other))[1] >= NOTICEABLE


def generate(served: Served, **arguments: Any) -> Any:
    common = {**CLIP, "scheduler": "DDIMScheduler", "ip_adapter_scale": 0.6, "seed": 0}
    return served.generate(**{**common, **arguments})


def embeds_of(served: Served, photos: Sequence[Any]) -> torch.Tensor:
    """Return the embeddings of pictures in diffusers' layout: [2 * pictures, 1, features]."""
    embeds = served.client.encode_image(model=served.bundle.name, adapter="plain", images=list(photos))
    return torch.from_numpy(embeds).flatten(0, 1)[:, None]


@pytest.mark.parametrize("keyframes", [None, [0, 3, 5], [0, 2], [0]], ids=str)
def test_pictures_per_frame(control: Served, keyframes: list[int] | None) -> None:
    photos = PHOTOS[: len(keyframes or PHOTOS)]
    with tokens_per_frame(animate(control), keyframes or range(FRAMES)):
        expected = oracle.generate(animate(control), **CLIP, ip_adapter_image_embeds=[embeds_of(control, photos)])
    given = {"ip_adapter_image_per": "frame", **({"ip_adapter_keyframes": keyframes} if keyframes else {})}
    result = generate(control, ip_adapter_image=photos, **given)
    assert_same_clip(result, expected)
    if len(photos) > 1:
        assert_other_clip(result, generate(control, ip_adapter_image=photos[::-1], **given))
    else:
        assert_same_clip(result, frames(generate(control, ip_adapter_image=photos)))


def test_embeddings_and_negative_pictures_per_frame(control: Served) -> None:
    keyframes, photos = [0, 5], PHOTOS[:2]
    embeds = control.client.encode_image(model="control", adapter="plain", images=photos)
    given: dict[str, Any] = {"ip_adapter_image_per": "frame", "ip_adapter_keyframes": keyframes}
    result = generate(control, ip_adapter_image=photos, **given)
    assert_same_clip(generate(control, ip_adapter_image_embeds=embeds, **given), frames(result))
    negative = generate(control, ip_adapter_image=photos, negative_ip_adapter_image=PHOTOS[2:4], **given)
    assert_other_clip(result, negative)
    embeds[0] = control.client.encode_image(model="control", adapter="plain", images=PHOTOS[2:4])[1]
    assert_same_clip(generate(control, ip_adapter_image_embeds=embeds, **given), frames(negative))


def moving_masks() -> list[Any]:
    """Masks of two pictures in each frame, which swap their sides in the middle of the clip."""
    return [LEFT, RIGHT] * (FRAMES // 2) + [RIGHT, LEFT] * (FRAMES // 2)


def test_masks_per_frame(control: Served) -> None:
    masks, photos = moving_masks(), PHOTOS[:2]
    rows = prepared(masks).reshape(FRAMES, 2, 64, 64).repeat(2, 1, 1, 1)
    expected = oracle.generate(
        animate(control), **CLIP, ip_adapter_image=[photos], cross_attention_kwargs={"ip_adapter_masks": [rows]}
    )
    result = generate(control, ip_adapter_image=photos, ip_adapter_masks=masks)
    assert_same_clip(result, expected)
    assert_other_clip(result, generate(control, ip_adapter_image=photos, ip_adapter_masks=masks[:2]))


def test_pictures_and_masks_per_frame(control: Served) -> None:
    """Two pictures for each of two keyframes, with masks that move."""
    masks, photos = moving_masks(), PHOTOS[:4]
    rows = prepared(masks).reshape(FRAMES, 2, 64, 64).repeat(2, 1, 1, 1)
    embeds = embeds_of(control, photos).unflatten(0, (4, 2)).flatten(1, 2)
    with tokens_per_frame(animate(control), [0, 4]):
        expected = oracle.generate(
            animate(control),
            **CLIP,
            ip_adapter_image_embeds=[embeds],
            cross_attention_kwargs={"ip_adapter_masks": [rows]},
        )
    given: dict[str, Any] = {"ip_adapter_image_per": "frame", "ip_adapter_keyframes": [0, 4]}
    assert_same_clip(generate(control, ip_adapter_image=photos, ip_adapter_masks=masks, **given), expected)


def test_clips_with_pictures_per_prompt(control: Served) -> None:
    given: dict[str, Any] = {"prompt": PROMPTS, "seed": [3, 4], "num_frames": 3}
    result = generate(control, ip_adapter_image=PHOTOS[:2], ip_adapter_image_per="prompt", **given)
    alone = [
        frames(generate(control, ip_adapter_image=PHOTOS[index], **{**given, "prompt": prompt, "seed": 3 + index}))
        for index, prompt in enumerate(PROMPTS)
    ]
    assert_same_clip(result, np.concatenate(alone))


def test_windows_have_the_pictures_of_their_frames(control: Served) -> None:
    """The same picture for every frame equals one for all; others in the second half mainly change the last frames."""
    common: dict[str, Any] = {"num_frames": 20, "context_length": 8}
    one = generate(control, ip_adapter_image=PHOTOS[0], **common)
    same = generate(control, ip_adapter_image=[PHOTOS[0]] * 20, ip_adapter_image_per="frame", **common)
    assert_same_clip(same, frames(one))
    photos = [PHOTOS[0]] * 10 + [PHOTOS[1]] * 10
    half = generate(control, ip_adapter_image=photos, ip_adapter_image_per="frame", **common)
    changed = np.abs(frames(half)[0].astype(float) - frames(one)[0]).mean(axis=(1, 2, 3))
    assert changed[-4:].mean() > 2 * changed[:4].mean()


def test_batches_of_different_clips(control: Served) -> None:
    requests: list[dict[str, Any]] = [
        {"ip_adapter_image": PHOTOS, "ip_adapter_image_per": "frame"},
        {"ip_adapter_image": PHOTOS[:2], "ip_adapter_masks": moving_masks()},
        {"ip_adapter_image": PHOTOS[3]},
        {"prompt": "a red house", "ip_adapter_scale": 1.0},
        {"num_frames": 12, "context_length": 6, "ip_adapter_image": PHOTOS[:2], "ip_adapter_image_per": "frame",
         "ip_adapter_keyframes": [0, 11]},
    ]  # fmt: skip
    alone = [frames(generate(control, **request)) for request in requests]
    with ThreadPoolExecutor(len(requests)) as threads:
        together = list(threads.map(lambda request: generate(control, **request), requests))
    for result, expected in zip(together, alone, strict=True):
        assert_same_clip(result, expected)


SIX: dict[str, Any] = {"ip_adapter_image": PHOTOS, "ip_adapter_image_per": "frame", "num_frames": FRAMES}
TWO: dict[str, Any] = {"ip_adapter_image": PHOTOS[:2]}
PER_PROMPT: dict[str, Any] = {"ip_adapter_image_per": "prompt"}
ORDER = "ip_adapter_keyframes: must be in ascending order from 0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (PER_PROMPT | {"ip_adapter_image": PHOTOS[:3]}, "3 pictures cannot be divided equally among 2 prompts"),
        (SIX | TWO, "ip_adapter_image: plain: 2 pictures cannot be divided equally among 6 frames"),
        (SIX | {"ip_adapter_keyframes": [0, 1, 2, 3]}, "6 pictures cannot be divided equally among 4 keyframes"),
        (SIX | {"num_frames": None}, "ip_adapter_image_per: frame needs num_frames or video"),
        (SIX | {"ip_adapter_keyframes": [1, 3]}, ORDER),
        (SIX | {"ip_adapter_keyframes": [0, 3, 3]}, ORDER),
        (SIX | {"ip_adapter_keyframes": [0, 6]}, "ip_adapter_keyframes: must be below the number of frames, 6; got 6"),
        (
            TWO | {"num_frames": FRAMES, "ip_adapter_keyframes": [0, 3]},
            "ip_adapter_keyframes: needs an adapter with ip_adapter_image_per frame",
        ),
        (
            TWO | {"ip_adapter_masks": [LEFT] * 3},
            r"plain: 3 masks for 2 image prompts at a time; expected 2, or 4 \(2 for each prompt\)",
        ),
        (TWO | {"ip_adapter_masks": [LEFT] * 4, "num_frames": FRAMES}, r"expected 2, or 12 \(2 for each frame\)"),
        (
            {"ip_adapter_image_embeds": np.zeros((4, 1, 64), np.float32)},
            r"the first axis must be 2 \(negative, positive\) or 1 \(positive\); got \[4, 1, 64\]",
        ),
        (TWO | PER_PROMPT | {"ip_adapter_scale": [[0.1, 0.2]]}, "ip_adapter_scale: plain: a list needs masks"),
    ],
)
def test_refusals_say_what_is_allowed(control: Served, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        control.generate(**{"prompt": PROMPTS, "num_inference_steps": 1, **arguments})
