"""Fields of a request become keyword arguments of the SDK, and wrong ones are refused by name."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imprompt import InvalidRequest
from imprompt_gateway import pictures
from imprompt_gateway.errors import UnknownModel
from imprompt_gateway.parameters import ALIASES, KNOWN, OPENAI, PARAMETERS
from imprompt_gateway.requests import ImageRequest, read_request

BASE = {"model": "world", "prompt": "a flower"}


def read(accept: str = "*/*", required: tuple[str, ...] = ("model", "prompt"), **fields: Any) -> ImageRequest:
    return read_request(BASE | fields, accept=accept, required=required)


def refused(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        read(**fields)
    assert str(caught.value).startswith(f"{caught.value.parameter}: ")
    return caught.value


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


RED = encoded(Image.new("RGB", (8, 8), "red"))


def test_parameters_keep_their_names_and_values() -> None:
    given: dict[str, Any] = {
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
        "scheduler_config": {"a": 1},
        "negative_prompt": ["b"],
        "ip_adapter_image_per": {"plain": "frame"},
        "ip_adapter_keyframes": [0, 8],
    }
    request = read(**given)
    assert given.items() <= request.keywords.items()
    assert request.keywords["model"] == "world"
    assert request.keywords["prompt"] == "a flower"


def test_openais_names_stand_for_parameters() -> None:
    assert {name for names in ALIASES.values() for name in names} <= PARAMETERS.keys()
    assert ALIASES.keys() <= OPENAI.keys()
    keywords = read(n=2, size="96x64", frame_count=8).keywords
    assert (keywords["num_images_per_prompt"], keywords["width"], keywords["height"]) == (2, 96, 64)
    assert keywords["num_frames"] == 8
    assert not keywords.keys() & (OPENAI.keys() - {"model"})


def test_automatic_size_is_the_servers() -> None:
    assert not read(size="auto").keywords.keys() & {"width", "height"}


@pytest.mark.parametrize("size", ["64", "64x", "axb", "64x64x64", 64, "1234567x64", "-64x64"])
def test_wrong_sizes_are_refused(size: object) -> None:
    error = refused(size=size)
    assert error.parameter == "size"
    assert "512x768" in str(error)


@pytest.mark.parametrize(
    ("alias", "value", "name", "other"),
    [
        ("n", 2, "num_images_per_prompt", 2),
        ("size", "64x64", "width", 64),
        ("frame_count", 8, "num_frames", 8),
        ("mask", "", "mask_image", ""),
    ],
)
def test_a_value_cannot_be_given_under_two_names(alias: str, value: object, name: str, other: object) -> None:
    error = refused(**{alias: value, name: other})
    assert error.parameter == alias
    assert name in str(error)


def test_errors_use_the_name_that_the_caller_used() -> None:
    request = read(n=1000, size="640x64")
    many = InvalidRequest("num_images_per_prompt: must be 1 to 64", parameter="num_images_per_prompt")
    wide = InvalidRequest("width: must be 64 to 128", parameter="width")
    other = InvalidRequest("strength: needs an image", parameter="strength")
    assert str(request.in_callers_terms(many)) == "n: must be 1 to 64"
    assert request.in_callers_terms(many).parameter == "n"
    assert str(request.in_callers_terms(wide)) == "size: width must be 64 to 128"
    assert request.in_callers_terms(other) is other
    assert read(num_images_per_prompt=1000).in_callers_terms(many) is many


def test_model_that_is_not_served_is_another_kind_of_error() -> None:
    error = InvalidRequest("model: unknown bundle 'x'", parameter="model")
    assert isinstance(read().in_callers_terms(error), UnknownModel)


@pytest.mark.parametrize("name", ["model", "prompt", "image"])
@pytest.mark.parametrize("null", [False, True])
def test_required_fields(name: str, null: bool) -> None:
    fields: dict[str, Any] = BASE | {"image": text(RED)}
    fields[name] = None
    if not null:
        del fields[name]
    with pytest.raises(InvalidRequest, match=f"{name}: is required"):
        read_request(fields, accept="", required=("model", "prompt", "image"))


def test_text_embeddings_stand_for_prompts() -> None:
    embeds = [[[0.5] * 4] * 77] * 2
    fields = {"model": "world", "prompt_embeds": embeds, "num_images_per_prompt": 3}
    keywords = read_request(fields, accept="", required=("model", "prompt")).keywords
    assert keywords["prompt_embeds"].shape == (2, 77, 4)
    assert "prompt" not in keywords
    assert len(keywords["seed"]) == 6


def test_null_means_not_given() -> None:
    assert "guidance_scale" not in read(guidance_scale=None, stream=None, response_format=None).keywords


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("num_inference_step", "did you mean num_inference_steps"),
        ("ip_adapter_images", "did you mean ip_adapter_image"),
        ("steps", "num_inference_steps"),
        ("cfg_scale", "guidance_scale"),
        ("style", "prompt"),
        ("zzz", "/docs"),
        ("output_type", "output_format"),
    ],
)
def test_unknown_names_are_refused_with_a_suggestion(name: str, expected: str) -> None:
    error = refused(**{name: 1})
    assert error.parameter == name
    assert expected in str(error)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("response_format", "url"),
        ("quality", "hd"),
        ("background", "transparent"),
        ("moderation", "low"),
        ("model", 3),
        ("stream", "yes"),
        ("partial_images", -1),
        ("partial_images", True),
    ],
)
def test_values_of_openais_parameters(name: str, value: object) -> None:
    assert refused(**({"stream": True} | {name: value})).parameter == name


def test_parameters_without_effect_are_accepted() -> None:
    request = read(user="a", safety_identifier="b", quality="auto", background="opaque", moderation="auto")
    assert request.keywords.keys() == read().keywords.keys()


@pytest.mark.parametrize("name", ["partial_images", "preview", "progress_every"])
def test_parameters_of_streams_need_a_stream(name: str) -> None:
    assert "stream" in str(refused(**{name: 1}))


def test_partial_images_ask_for_previews() -> None:
    assert read(stream=True, partial_images=2).keywords["preview"] is True
    assert "preview" not in read(stream=True, partial_images=0).keywords
    assert read(stream=True, preview=True).partial_images is None
    assert refused(stream=True, partial_images=1, preview=True).parameter == "partial_images"


@pytest.mark.parametrize(
    ("fields", "count"),
    [({}, 1), ({"n": 3}, 3), ({"prompt": ["a", "b"], "n": 2}, 4), ({"n": "x"}, 1), ({"n": 10**9}, None)],
)
def test_seed_is_fixed_for_every_picture(fields: dict[str, Any], count: int | None) -> None:
    seeds = read(**fields).keywords.get("seed")
    assert (seeds and len(seeds)) == count
    assert seeds is None or len({*seeds}) == count
    assert read(**fields, seed=5).keywords["seed"] == 5


def test_pictures_are_decoded_wherever_they_are() -> None:
    uri = f"data:image/png;base64,{text(RED)}"
    request = read(
        image=text(RED),
        control_image=[[text(RED)], [uri]],
        ip_adapter_image={"plain": [uri, text(RED)], "plus": None},
        ip_adapter_masks=RED,
    )
    assert request.keywords["image"] == RED
    assert request.keywords["control_image"] == [[RED], [RED]]
    assert request.keywords["ip_adapter_image"] == {"plain": [RED, RED], "plus": None}
    assert request.keywords["ip_adapter_masks"] == RED


def test_base64_may_have_line_breaks() -> None:
    assert read(image=base64.encodebytes(RED).decode()).keywords["image"] == RED


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("https://example.com/a.png", "URLs are not fetched"),
        ("data:image/png,abc", "base64"),
        ("not base64!", "base64"),
        ("abc", "base64"),
        (5, "not int"),
        ({"plain": 5}, "not int"),
        ("é", "base64"),
    ],
)
def test_wrong_pictures_are_refused(value: object, expected: str) -> None:
    error = refused(ip_adapter_image=value)
    assert error.parameter == "ip_adapter_image"
    assert expected in str(error)


def test_every_parameter_with_pictures_is_decoded() -> None:
    takes_pictures = {name for name, schema in KNOWN.items() if schema["x-type"] == "pictures"}
    assert takes_pictures == {
        *("image", "mask", "mask_image", "control_image", "video"),
        *("ip_adapter_image", "negative_ip_adapter_image", "ip_adapter_masks"),
    }


def test_embeddings_become_arrays() -> None:
    embeds = [[[0.5] * 4] * 3] * 2
    array = read(ip_adapter_image_embeds=embeds).keywords["ip_adapter_image_embeds"]
    assert (array.shape, array.dtype) == ((2, 3, 4), np.float32)
    by_adapter = read(ip_adapter_image_embeds={"plain": embeds}).keywords["ip_adapter_image_embeds"]
    assert by_adapter["plain"].shape == (2, 3, 4)
    assert "nested lists" in str(refused(ip_adapter_image_embeds=[[1], [1, 2]]))
    assert "nested lists" in str(refused(ip_adapter_image_embeds={"plain": "abc"}))
    assert "nested lists" in str(refused(ip_adapter_image_embeds=[10**400]))


def test_transparent_pixels_of_the_mask_are_repainted() -> None:
    mask = Image.new("RGBA", (8, 4), (9, 9, 9, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 3, 4))
    request = read(image=RED, mask=encoded(mask))
    with Image.open(io.BytesIO(request.keywords["mask_image"])) as found:
        assert found.mode == "L"
        assert np.array_equal(np.asarray(found), np.array([[255] * 3 + [0] * 5] * 4))
    assert request.aliases["mask_image"] == "mask"


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (encoded(Image.new("L", (8, 8))), "mask_image"),
        (encoded(Image.new("RGB", (8, 8)), "JPEG"), "PNG, WEBP"),
        (encoded(Image.new("RGBA", (64, 64)))[:60], "PNG, WEBP"),
        (b"", "PNG, WEBP"),
        ([RED, RED], "single"),
    ],
    ids=["opaque", "jpeg", "damaged", "empty", "two"],
)
def test_wrong_masks_are_refused(mask: object, expected: str) -> None:
    error = refused(image=RED, mask=mask)
    assert error.parameter == "mask"
    assert expected in str(error)


def test_huge_masks_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_MASK_PIXELS", 63)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    assert "8x8" in str(refused(image=RED, mask=encoded(Image.new("RGBA", (8, 8)))))


@pytest.mark.parametrize(
    ("accept", "fields", "expected"),
    [
        ("", {}, ("png", False)),
        ("*/*", {}, ("png", False)),
        ("application/json", {"output_format": "webp"}, ("webp", False)),
        ("image/jpeg", {}, ("jpeg", True)),
        ("text/html, image/webp;q=0.9, */*", {}, ("webp", True)),
        ("image/*", {}, ("png", True)),
        ("image/*", {"output_format": "jpeg"}, ("jpeg", True)),
        ("application/json, image/png", {}, ("png", False)),
        ("*/*", {"num_frames": 8}, ("gif", False)),
        ("image/*", {"video": [RED]}, ("gif", True)),
        ("image/webp", {"num_frames": 8}, ("webp", True)),
    ],
)
def test_accept_decides_the_form_of_the_answer(accept: str, fields: dict[str, Any], expected: tuple[str, bool]) -> None:
    request = read(accept, **fields)
    assert (request.output_format, request.as_file) == expected
    assert request.keywords["output_format"] == expected[0]


@pytest.mark.parametrize(
    ("fields", "name"), [({"output_format": "png"}, "output_format"), ({"n": 2}, "n"), ({"stream": True}, "stream")]
)
def test_a_file_holds_one_picture_in_the_accepted_format(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read("image/jpeg", **fields)
    assert caught.value.parameter == name
