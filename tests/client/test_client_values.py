"""Any value a caller passes either becomes a request or raises an error that names the parameter."""

from __future__ import annotations

import array
import collections
import contextlib
import datetime
import decimal
import fractions
import io
import math
import pathlib
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from fake_triton import EMBED_SIZE
from PIL import Image

from imprompt import InvalidRequest
from imprompt._errors import short_repr
from imprompt._model import Input, ServedModel
from imprompt._request import Request, build_encode_request, build_request, check_request
from imprompt._retry import check_timeout
from imprompt_serving import wire
from imprompt_serving.parameters import Group

CASES = 4500
TABLES = [wire.parameter_tensors(group) for group in Group]
ADAPTERS = ("plus", "face")


def served(*adapters: str) -> ServedModel:
    """Build a model with every known input, and one input that is newer than the client."""
    inputs = [
        Input(name=tensor.name, dtype=tensor.dtype.replace("STRING", "BYTES"), dims=tensor.dims)
        for tensor in (tensor for table in TABLES for tensor in table)
    ]
    inputs += [
        Input(name=f"ip_adapter_image_embeds_{name}", dtype="FP32", dims=(-1, -1, EMBED_SIZE)) for name in adapters
    ]
    inputs.append(Input(name="newer", dtype="BYTES", dims=(-1,)))
    return ServedModel(
        name="all",
        bundle="all",
        inputs={tensor.name: tensor for tensor in inputs},
        capabilities={"ip_adapters": [{"name": name} for name in adapters]},  # type: ignore[typeddict-item]
    )


MODELS = (served(), served("plus"), served(*ADAPTERS))


class Raises:
    """An object whose every special method fails."""

    def __repr__(self) -> str:
        raise KeyError("repr")

    def __array__(self, *arguments: Any, **options: Any) -> Any:
        raise KeyError("array")


class Scalar:
    """An object that claims to be an array but is not."""

    def __array__(self, *arguments: Any, **options: Any) -> Any:
        return np.array(object())


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def nested_dict(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"up": value}
    return value


def circular() -> Any:
    value: dict[str, Any] = {}
    value["up"] = value
    return value


def closed_picture() -> Image.Image:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "JPEG")
    buffer.seek(0)
    image = Image.open(buffer)
    buffer.close()
    return image


def cut_picture() -> Image.Image:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    return Image.open(io.BytesIO(buffer.getvalue()[:1000]))


def png(mode: str = "RGB", size: tuple[int, int] = (4, 2)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return buffer.getvalue()


VALUES: list[Callable[[], Any]] = [
    lambda: None,
    lambda: True,
    lambda: False,
    lambda: 0,
    lambda: -1,
    lambda: 1,
    lambda: 2**31,
    lambda: 2**63 + 5,
    lambda: 2**64,
    lambda: -(2**70),
    lambda: 10**400,
    lambda: 10**4500,
    lambda: 0.5,
    lambda: -0.0,
    lambda: math.nan,
    lambda: math.inf,
    lambda: 1e300,
    lambda: 1j,
    lambda: decimal.Decimal("0.5"),
    lambda: fractions.Fraction(1, 3),
    lambda: fractions.Fraction(10**400, 3),
    lambda: datetime.date(2020, 1, 1),
    lambda: "",
    lambda: "a",
    lambda: "a" * 20_000,
    lambda: "\ud83d",
    lambda: "a\0b",
    lambda: "plus",
    lambda: ".",
    lambda: "a" * 300 + ".png",
    lambda: b"",
    lambda: b"abc",
    lambda: b"\x89PNG\r\n\x1a\n",
    lambda: png(),
    lambda: bytearray(png()),
    lambda: memoryview(png()),
    lambda: pathlib.Path("nowhere"),
    lambda: io.BytesIO(png()),
    lambda: [],
    lambda: (),
    lambda: {},
    lambda: set(),
    lambda: {1, 2},
    lambda: range(3),
    lambda: (each for each in "ab"),
    lambda: iter([1]),
    lambda: map(str, [1]),
    lambda: {"0": "a", "1": "b"},
    lambda: {1: 2},
    lambda: {None: 1},
    lambda: {("a",): 1},
    lambda: {"plus": None},
    lambda: {"up": {"block_0": [0.0, math.inf]}},
    lambda: {"up": math.nan},
    lambda: {"\ud83d": 1},
    lambda: {"a": "\ud83d"},
    lambda: {"a": object()},
    lambda: {"a": b"b"},
    lambda: {"a": 10**4500},
    lambda: collections.OrderedDict(a=(1, None, np.float32(2), np.arange(3))),
    lambda: nested(50),
    lambda: nested(900),
    lambda: nested(3_000),
    lambda: nested_dict(900),
    lambda: nested_dict(3_000),
    circular,
    object,
    lambda: object,
    lambda: len,
    Raises,
    Scalar,
    lambda: [Raises()],
    lambda: np.float32(0.5),
    lambda: np.int64(3),
    lambda: np.bool_(True),
    lambda: np.str_("a"),
    lambda: np.bytes_(b"a"),
    lambda: np.array("a"),
    lambda: np.array(["a", "b"]),
    lambda: np.array([b"a"]),
    lambda: np.array([None]),
    lambda: np.array([1, 2]),
    lambda: np.array(2**63, np.uint64),
    lambda: np.array([[1], [2]]),
    lambda: np.array([]),
    lambda: np.zeros((0, 4, 3), np.uint8),
    lambda: np.zeros((4, 4, 3), np.uint8),
    lambda: np.zeros((2, 4, 4, 3), np.uint8),
    lambda: np.zeros((4, 4, 3), np.float64),
    lambda: np.full((4, 4), math.nan),
    lambda: np.zeros((1,) * 30, np.uint8),
    lambda: np.zeros((2, 1, EMBED_SIZE), np.float16),
    lambda: np.full((2, 1, EMBED_SIZE), 1e300),
    lambda: np.array([datetime.date(2020, 1, 1)], dtype="datetime64[D]"),
    lambda: np.zeros(3, dtype=[("a", int)]),
    lambda: np.array([Image.new("RGB", (2, 2)), None], dtype=object),
    lambda: array.array("d", [1.0]),
    lambda: torch.tensor(1),
    lambda: torch.zeros(2, 1, EMBED_SIZE, dtype=torch.bfloat16),
    lambda: torch.zeros(4, 4, 3, dtype=torch.uint8),
    lambda: torch.zeros(2, 2).to_sparse(),
    lambda: torch.zeros(2, device="meta"),
    lambda: torch.complex(torch.zeros(2), torch.zeros(2)),
    lambda: Image.new("RGB", (0, 0)),
    lambda: Image.new("RGB", (0, 5)),
    closed_picture,
    cut_picture,
    *(
        (lambda mode=mode: Image.new(mode, (4, 2)))
        for mode in "1 L LA P PA RGB RGBA RGBX RGBa La CMYK YCbCr HSV LAB I F I;16 I;16B I;16L I;16N".split()
    ),
    lambda: Image.fromarray(np.array([[-1, 70_000]], np.int32)),
    lambda: [1, None],
    lambda: [1, "a"],
    lambda: [True, 1.0],
    lambda: ["a", 3],
    lambda: [None],
    lambda: [[1.0], [1.0, 2.0]],
    lambda: [["a"], "b"],
    lambda: [{"a": 1}, {}],
    lambda: [Image.new("RGB", (2, 2)), None],
    lambda: [[Image.new("RGB", (2, 2))], []],
    lambda: ["plus", "face"],
]


def some_value(draw: random.Random, depth: int = 0) -> Any:
    """Draw one of `VALUES`, or a list or dict of them."""
    kind = draw.random()
    if depth < 2 and kind < 0.12:
        return [some_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    if depth < 2 and kind < 0.2:
        return {draw.choice(["plus", "face", "up", "a"]): some_value(draw, depth + 1) for _ in range(2)}
    return draw.choice(VALUES)()


def check(build: Callable[[], Any], parameters: Mapping[str, Any]) -> bool:
    """Whether `build` returns a request; if not, check that its error is presentable and names one of `parameters`."""
    refusal = None
    try:
        with np.errstate(all="raise"):
            built = build()
    except InvalidRequest as error:
        refusal = error
    if refusal is not None:
        message = str(refusal)
        assert refusal.parameter is not None
        assert refusal.parameter in parameters, message
        assert message.startswith(refusal.parameter[:900])
        assert len(message) <= 1000
        assert " at 0x" not in message
        message.encode()
        assert "\n" not in message
        return False
    if isinstance(built, Request):
        assert len(built.message(1.0).SerializeToString()) > 0
    return True


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seed", range(3))
def test_any_value_is_encoded_or_rejected_by_name(seed: int) -> None:
    draw, accepted = random.Random(seed), 0
    names = [*dict.fromkeys(name for model in MODELS for name in model.inputs), "ip_adapter_image_embeds", "x" * 9000]
    for _ in range(CASES // 3):
        model = draw.choice(MODELS)
        given = {"prompt": "a" if draw.random() < 0.8 else some_value(draw)}
        given |= {draw.choice(names): some_value(draw) for _ in range(draw.choice([1, 1, 1, 2, 4]))}
        prompt, parameters = given["prompt"], {name: value for name, value in given.items() if name != "prompt"}
        accepted += check(lambda: build_request(model, prompt, parameters), given)  # noqa: B023
        check(lambda: check_request(model, prompt, parameters), given)  # noqa: B023
    assert CASES / 3 * 0.02 < accepted < CASES / 3 * 0.9  # both outcomes are covered


@pytest.mark.parametrize("seed", range(2))
def test_any_images_are_encoded_or_rejected_by_name(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(300):
        adapter = draw.choice(["plus", "face", some_value(draw)])
        images = some_value(draw)
        given = {"adapter": adapter, "images": images, "model": ""}
        check(lambda: build_encode_request(MODELS[2], adapter, images), given)  # noqa: B023


def test_any_timeout_is_accepted_or_rejected_by_name() -> None:
    for value in VALUES:
        check(lambda: check_timeout(value()), {"timeout": None})  # noqa: B023


# Values that are easily confused with valid ones

TEXTS = [
    name
    for name, wanted in MODELS[0].inputs.items()
    if wanted.dtype == "BYTES"
    and name
    in (
        "prompt negative_prompt prompt_2 negative_prompt_2 scheduler controlnet control_image_annotator output_format"
    ).split()
]
NUMBERS = [
    name
    for name, wanted in MODELS[0].inputs.items()
    if wanted.dtype != "BYTES"
    and name
    not in ("timeout", "encode_prompt", "image_latents", "ip_adapter_scale", "ip_adapter_start", "ip_adapter_end")
]


def build(model: ServedModel = MODELS[2], prompt: Any = "a", **parameters: Any) -> Request:
    return build_request(model, prompt, parameters)


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize(
    "value",
    [
        {"0": "a", "1": "b"},
        b"a",
        [b"a"],
        ["a", b"b"],
        [["a"]],
        np.array(["a"]),
        np.array("a"),
        3,
        1.5,
        True,
        Image.new("RGB", (2, 2)),
        np.zeros((2, 2, 3), np.uint8),
        pathlib.Path("a"),
        "\ud83d",
        ["a", "\ud83d"],
    ],
    ids=short_repr,
)
def test_text_inputs_accept_only_strings(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"^{name}: must be (a string|valid Unicode)") as caught:
        build(**{name: value})
    assert caught.value.parameter == name


def test_error_names_the_invalid_item_of_a_list() -> None:
    with pytest.raises(InvalidRequest, match=r"^prompt: must be a string or a list of .*, got bytes \(item 2 of 3\)$"):
        build(prompt=["a", b"b", "c"])
    with pytest.raises(InvalidRequest, match=r"character 1 \('\\ud83d'\) is a lone surrogate \(item 2 of 2\)$"):
        build(negative_prompt=["a", "a\ud83d"])


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "value",
    [{"0": 1}, "1", b"1", ["1"], [None], [True, 2], np.array(["1"]), Image.new("L", (2, 2)), object(), [[1], [2, 3]]],
)
def test_numeric_inputs_accept_only_numbers(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"^{name}: must (be|have) ") as caught:
        build(**{name: value})
    assert caught.value.parameter == name


@pytest.mark.parametrize("value", ['{"a": 1}', [{"a": 1}], [["a", 1]], 3, b"{}", True])
@pytest.mark.parametrize("name", ["scheduler_config", "lora"])
def test_configurations_must_be_dicts(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=rf"^{name}: must be a dict"):
        build(**{name: value})


@pytest.mark.parametrize("name", ["image", "mask_image", "control_image", "video", "ip_adapter_image"])
@pytest.mark.parametrize("value", [{"a": png()}, 3, True, [[png()], 3], np.array(["a"]), ("a", 1), lambda: png()])
def test_picture_inputs_accept_only_pictures(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"^{name}: "):
        build(MODELS[1], **{name: value})


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (b"", "the data is empty; expected a PNG, JPEG, WebP, GIF, BMP or AVIF file"),
        (b"II*\0", "the data is not a PNG, JPEG, WebP, GIF, BMP or AVIF picture"),
        ("notes.txt", "'notes.txt' is not a PNG, JPEG, WebP, GIF, BMP or AVIF picture"),
        ("empty.png", "'empty.png' is empty; expected a PNG, JPEG, WebP, GIF, BMP or AVIF file"),
        ("nowhere.png", "no such file: nowhere.png"),
        ("\0", r"'\x00' is not a valid path: embedded null byte"),
        ("\ud83d", "is not a valid path"),
        (Image.new("RGB", (0, 0)), "the picture has no pixels (0x0)"),
        (Image.new("F", (2, 2)), "mode F has no fixed range of values"),
        (
            Image.fromarray(np.array([[-1, 70_000]], np.int32)),
            "values of a mode I picture must be 0 to 65535, not -1 to 70000",
        ),
        (closed_picture(), "the picture cannot be read"),
        (cut_picture(), "the picture cannot be read"),
    ],
    ids=short_repr,
)
@pytest.mark.parametrize("name", ["image", "control_image", "video", "ip_adapter_image", "negative_ip_adapter_image"])
def test_error_describes_the_invalid_picture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, name: str, value: Any, problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    pathlib.Path("notes.txt").write_text("what a day")
    pathlib.Path("empty.png").touch()
    with pytest.raises(InvalidRequest) as caught:
        build(MODELS[1], **{name: value})
    assert str(caught.value).startswith(f"{name}: ")
    assert problem in str(caught.value)
    with pytest.raises(InvalidRequest) as caught:
        build(MODELS[1], **{name: [png(), value]})
    assert str(caught.value).startswith(f"{name}: picture 2 of 2: ")
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("image", "pixel"),
    [
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.new("HSV", (2, 2), (0, 255, 255)), (255, 0, 0)),
        (Image.new("RGBX", (2, 2), (255, 0, 0, 0)), (255, 0, 0)),
        (Image.new("RGBa", (2, 2), (128, 0, 0, 128)), (255, 0, 0, 128)),
        (Image.new("LA", (2, 2), (255, 128)).convert("La"), (255, 128)),
        (Image.new("I", (2, 2), 200), 200),
        (Image.new("I", (2, 2), 40_000), 40_000),
        (Image.new("I;16", (2, 2), 200), 200),
        (Image.new("I;16", (2, 2), 40_000), 40_000),
        (Image.new("I;16B", (2, 2), 40_000), 40_000),
        (Image.new("I;16L", (2, 2), 40_000), 40_000),
    ],
    ids=lambda value: getattr(value, "mode", repr(value)),
)
def test_converting_a_pil_mode_keeps_pixel_values(image: Image.Image, pixel: Any) -> None:
    (tensor,) = [tensor for tensor in build(image=image).tensors if tensor.name == "image"]
    sent = Image.open(io.BytesIO(tensor.data[4:]))
    assert sent.getpixel((0, 0)) == pixel
    assert (sent.mode == "I;16") == image.mode.startswith("I")


def test_float_masks_range_from_0_to_1() -> None:
    (tensor,) = [t for t in build(mask_image=Image.new("F", (2, 2), 1.0)).tensors if t.name == "mask_image"]
    assert Image.open(io.BytesIO(tensor.data[4:])).getpixel((0, 0)) == 255


@contextlib.contextmanager
def limit(monkeypatch: pytest.MonkeyPatch, value: int) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr("imprompt._request.MAX_BYTES", value)
        yield


def test_request_too_large_for_protobuf_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        limit(monkeypatch, 3 * 2**20),
        pytest.raises(InvalidRequest, match=r"video: .* this parameter accounts for 4 MiB"),
    ):
        build(video=[np.random.default_rng(0).integers(0, 255, (1024, 1365, 3), np.uint8)])


@pytest.mark.parametrize("value", [-1, 2**64 - 1, 2**63, -(2**63), 0])
def test_seeds_are_encoded_the_same_in_every_form(value: int) -> None:
    wire_value = np.array(value % 2**64, np.uint64).view(np.int64).item()
    forms: list[Any] = [value, [value], (value,), np.array([value])]
    forms += [np.array(value), torch.tensor([value])] if value < 2**63 else [np.array(value, np.uint64)]
    for form in forms:
        (tensor,) = [tensor for tensor in build(seed=form).tensors if tensor.name == "seed"]
        assert np.frombuffer(tensor.data, np.int64).tolist() == [wire_value]
