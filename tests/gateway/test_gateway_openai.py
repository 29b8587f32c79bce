"""The `openai` package against a gateway in front of a real server: the pictures are those that the SDK gets."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from imprompt import Client
from imprompt_demo.world import picture
from imprompt_serving.launcher import Server

FAST: dict[str, Any] = {"num_inference_steps": 4, "seed": 5}
START, STYLE, OTHER = (picture(seed) for seed in (64, 62, 5))


@pytest.fixture(scope="module")
def client(gateway: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def sdk(world: Server) -> Iterator[Client]:
    with Client(world.grpc_address) as client:
        yield client


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def b64(image: Image.Image) -> str:
    return base64.b64encode(png(image)).decode()


def opened(text: str | None) -> Image.Image:
    assert text is not None
    return Image.open(io.BytesIO(base64.b64decode(text)))


def assert_same(text: str | None, expected: Image.Image) -> None:
    """Compare a picture from the gateway with one from the SDK; other requests may share its batches."""
    found = np.asarray(opened(text).convert("RGB"), np.int16)
    assert np.abs(found - np.asarray(expected, np.int16)).max() <= 2


def test_models_are_listed_with_their_capabilities(client: openai.OpenAI, sdk: Client) -> None:
    models = {model.id: model for model in client.models.list()}
    assert models.keys() == {"world", "world_lcm"}
    assert models["world"].to_dict()["capabilities"] == sdk.describe("world")
    assert client.models.retrieve("world_lcm").id == "world_lcm"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nope")
    assert caught.value.code == "model_not_found"


def test_several_pictures_with_their_seeds(client: openai.OpenAI, sdk: Client) -> None:
    answer: Any = client.images.generate(
        model="world", prompt="a flower", n=2, size="80x64", extra_body={"num_inference_steps": 4}
    )
    assert len(answer.data) == len(answer.seeds) == 2
    assert answer.size == "80x64"
    assert answer.output_format == "png"
    assert answer.timings["total"] > 0
    assert answer.warnings == []
    assert opened(answer.data[0].b64_json).size == (80, 64)
    assert answer.data[0].b64_json != answer.data[1].b64_json
    for seed, image in zip(answer.seeds, answer.data, strict=True):
        again = sdk.generate(model="world", prompt="a flower", width=80, height=64, num_inference_steps=4, seed=seed)
        assert_same(image.b64_json, again.images[0])


BODIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "scales by block": (
        {"ip_adapter_image": {"plain": b64(STYLE.image())}, "ip_adapter_scale": {"plain": {"up": 0.7}}},
        {"ip_adapter_image": {"plain": STYLE.image()}, "ip_adapter_scale": {"plain": {"up": 0.7}}},
    ),
    "two adapters": (
        {"ip_adapter_image": [b64(STYLE.image()), [b64(OTHER.image())] * 2], "ip_adapter_scale": [0.4, 0.6]},
        {"ip_adapter_image": [STYLE.image(), [OTHER.image()] * 2], "ip_adapter_scale": [0.4, 0.6]},
    ),
    "masks": (
        {
            "ip_adapter_image": {"plain": [b64(STYLE.image()), b64(OTHER.image())]},
            "ip_adapter_masks": {"plain": [b64(START.mask_image()), b64(STYLE.mask_image())]},
        },
        {
            "ip_adapter_image": {"plain": [STYLE.image(), OTHER.image()]},
            "ip_adapter_masks": {"plain": [START.mask_image(), STYLE.mask_image()]},
        },
    ),
    "control image": (
        {"control_image": b64(START.edge_image()), "controlnet_conditioning_scale": 0.8},
        {"control_image": START.edge_image(), "controlnet_conditioning_scale": 0.8},
    ),
    "scheduler": (
        {"scheduler": "EulerAncestralDiscreteScheduler", "scheduler_config": {"timestep_spacing": "linspace"}},
        {"scheduler": "EulerAncestralDiscreteScheduler", "scheduler_config": {"timestep_spacing": "linspace"}},
    ),
    "start picture": (
        {"image": b64(START.image()), "strength": 0.8, "negative_prompt": "blue"},
        {"image": START.image(), "strength": 0.8, "negative_prompt": "blue"},
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_every_parameter_goes_through_extra_body(client: openai.OpenAI, sdk: Client, name: str) -> None:
    body, keywords = BODIES[name]
    answer = client.images.generate(model="world", prompt="a star", extra_body=FAST | body)
    expected = sdk.generate(model="world", prompt="a star", **FAST | keywords)
    plain = sdk.generate(model="world", prompt="a star", **FAST)
    assert answer.data
    assert_same(answer.data[0].b64_json, expected.images[0])
    with pytest.raises(AssertionError):
        assert_same(answer.data[0].b64_json, plain.images[0])


def test_embeddings_in_place_of_pictures(client: openai.OpenAI, sdk: Client) -> None:
    embeds = sdk.encode_image("world", "plain", [STYLE.image()])
    body = {"ip_adapter_image_embeds": {"plain": embeds.tolist()}}
    answer = client.images.generate(model="world", prompt="a star", extra_body=FAST | body)
    assert answer.data
    expected = sdk.generate(model="world", prompt="a star", ip_adapter_image={"plain": STYLE.image()}, **FAST)
    assert_same(answer.data[0].b64_json, expected.images[0])


def transparent_where_white(mask: Image.Image) -> bytes:
    hole = Image.new("RGBA", mask.size)
    hole.putalpha(mask.convert("L").point(lambda value: 255 - value))
    return png(hole)


def test_edit_repaints_where_the_mask_is_transparent(client: openai.OpenAI, sdk: Client) -> None:
    answer: Any = client.images.edit(
        model="world",
        prompt="a heart",
        image=png(START.image()),
        mask=transparent_where_white(START.mask_image()),
        extra_body=FAST | {"ip_adapter_image": {"plain": [b64(STYLE.image())]}, "ip_adapter_scale": {"plain": 0.5}},
    )
    expected = sdk.generate(
        model="world",
        prompt="a heart",
        image=START.image(),
        mask_image=START.mask_image(),
        ip_adapter_image={"plain": STYLE.image()},
        ip_adapter_scale=0.5,
        **FAST,
    )
    assert_same(answer.data[0].b64_json, expected.images[0])
    assert answer.seeds == [5]


def test_edit_of_several_pictures(client: openai.OpenAI, sdk: Client) -> None:
    pictures = [START.image(), OTHER.image()]
    answer: Any = client.images.edit(
        model="world",
        prompt="a heart",
        n=2,
        image=[png(image) for image in pictures],
        extra_body={"num_inference_steps": 4, "seed": [1, 2], "strength": 0.7},
    )
    expected = sdk.generate(
        model="world", prompt="a heart", num_images_per_prompt=2, image=pictures, num_inference_steps=4, seed=[1, 2],
        strength=0.7,
    )  # fmt: skip
    assert answer.seeds == [1, 2]
    for image, other in zip(answer.data, expected.images, strict=True):
        assert_same(image.b64_json, other)


@pytest.mark.parametrize(("output_format", "kind"), [(None, "GIF"), ("webp", "WEBP")])
def test_frames_make_a_clip(client: openai.OpenAI, output_format: Any, kind: str) -> None:
    formats: dict[str, Any] = {"output_format": output_format} if output_format else {}
    answer = client.images.generate(model="world", prompt="a flower", frame_count=8, extra_body=FAST, **formats)
    assert answer.data
    assert answer.output_format == kind.lower()
    clip = opened(answer.data[0].b64_json)
    assert (clip.format, getattr(clip, "n_frames", 1)) == (kind, 8)


def test_stream_has_progress_partial_images_and_the_picture(client: openai.OpenAI, sdk: Client) -> None:
    events: list[Any] = list(
        client.images.generate(
            model="world", prompt="a star", stream=True, partial_images=2, output_format="webp",
            extra_body={"num_inference_steps": 6, "seed": 5},
        )
    )  # fmt: skip
    names = [event.type.removeprefix("image_generation.") for event in events]
    assert names.count("progress") == 6
    assert [(event.step, event.steps) for event in events if event.type.endswith("progress")] == [
        (step, 6) for step in range(1, 7)
    ]
    assert names.count("partial_image") == 2
    assert names[-1] == "completed"
    partial = [event for event in events if event.type.endswith("partial_image")]
    assert [event.partial_image_index for event in partial] == [0, 1]
    assert all(opened(event.b64_json).format == "WEBP" for event in partial)
    # Two partial images of six steps come after two steps and after four, or later if a preview is not ready by then.
    assert names.index("partial_image") >= 2
    result = events[-1]
    assert (result.seeds, result.index, result.size, result.output_format) == ([5], 0, "64x64", "webp")
    assert opened(result.b64_json).format == "WEBP"


def test_stream_of_an_edit_completes_every_picture(client: openai.OpenAI) -> None:
    events: list[Any] = list(
        client.images.edit(
            model="world", prompt="a star", image=png(START.image()), n=2, stream=True,
            extra_body={"num_inference_steps": 4, "seed": [1, 2], "progress_every": 3},
        )
    )  # fmt: skip
    assert {event.type for event in events} == {"image_edit.progress", "image_edit.completed"}
    completed = [event for event in events if event.type == "image_edit.completed"]
    assert [event.index for event in completed] == [0, 1]
    assert completed[0].seeds == [1, 2]
    assert completed[0].b64_json != completed[1].b64_json
    assert sum(event.type == "image_edit.progress" for event in events) < 3


@pytest.mark.parametrize(
    ("arguments", "error", "param"),
    [
        ({"model": "nope"}, openai.NotFoundError, "model"),
        ({"size": "640x64"}, openai.BadRequestError, "size"),
        ({"n": 1000}, openai.BadRequestError, "n"),
        ({"extra_body": {"num_inference_steps": 0}}, openai.BadRequestError, "num_inference_steps"),
        ({"extra_body": {"num_inference_step": 4}}, openai.BadRequestError, "num_inference_step"),
        ({"extra_body": {"ip_adapter_image": {"nope": "aGk="}}}, openai.BadRequestError, "ip_adapter_image"),
        ({"extra_body": {"image": "aGVsbG8="}}, openai.BadRequestError, "image"),
        ({"extra_body": {"strength": 0.5}}, openai.BadRequestError, "strength"),
        ({"output_format": "gif"}, openai.BadRequestError, "output_format"),
        ({"response_format": "url"}, openai.BadRequestError, "response_format"),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_name_the_parameter(
    client: openai.OpenAI, arguments: dict[str, Any], error: type[openai.APIStatusError], param: str, stream: bool
) -> None:
    request: dict[str, Any] = {"model": "world", "prompt": "a star", "stream": stream}
    with pytest.raises(error) as caught:
        client.images.generate(**request | arguments)
    assert caught.value.param == param
    assert param in caught.value.message


def test_timeout_of_a_request(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        client.images.generate(model="world", prompt="a star", extra_body={"timeout": 0.2, "num_inference_steps": 1000})
    assert caught.value.status_code == 504
    assert caught.value.code == "deadline_exceeded"


def test_timeout_in_a_stream_is_an_event(client: openai.OpenAI) -> None:
    events = client.images.generate(
        model="world", prompt="a star", stream=True, extra_body={"timeout": 3, "num_inference_steps": 1000}
    )
    with pytest.raises(openai.APIError) as caught:
        list(events)
    assert caught.value.code == "deadline_exceeded"


def test_keys(guarded: str) -> None:
    for key in ("first", "second"):
        assert openai.OpenAI(base_url=f"{guarded}/v1", api_key=key, max_retries=0).models.list().data
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{guarded}/v1", api_key="third", max_retries=0).models.list()
