"""Every kind of parameter, as the server gets it."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from fake_triton import EMBED_SIZE, Call, FakeTriton
from PIL import Image

from imprompt import Client, InvalidRequest
from imprompt._model import Input
from imprompt._request import Request

RED = Image.new("RGB", (4, 2), "red")
BLUE = Image.new("RGB", (4, 2), "blue")
GREY = Image.new("L", (4, 2), 100)


@pytest.fixture
def sent(client: Client, triton: FakeTriton) -> Any:
    """Sends a request, gives it as the server got it."""

    def send(model: str = "two", prompt: Any = "a", **parameters: Any) -> Call:
        client.generate(model=model, prompt=prompt, **parameters)
        return triton.calls[-1]

    return send


def pictures(call: Call, name: str) -> list[Image.Image]:
    return [Image.open(io.BytesIO(data)) for data in call.inputs[name]]


def colors(call: Call, name: str) -> list[Any]:
    return [image.getpixel((0, 0)) for image in pictures(call, name)]


def embeds(value: float, pictures: int = 1) -> np.ndarray:
    return np.full((2, pictures, EMBED_SIZE), value, np.float32)


@pytest.mark.parametrize(
    ("parameter", "value", "dtype", "expected"),
    [
        ("prompt", "ein Garten für dich", "BYTES", ["ein Garten für dich".encode()]),
        ("prompt", ["a", "b"], "BYTES", [b"a", b"b"]),
        ("prompt", [], "BYTES", []),
        ("scheduler", "DDIMScheduler", "BYTES", [b"DDIMScheduler"]),
        ("controlnet", ["depth", "canny"], "BYTES", [b"depth", b"canny"]),
        ("height", 64, "INT32", [64]),
        ("height", np.int64(64), "INT32", [64]),
        ("original_size", (64, 128), "INT32", [64, 128]),
        ("guidance_scale", 7, "FP64", [7.0]),
        ("guidance_scale", np.float32(0.5), "FP64", [0.5]),
        ("guidance_scale", float("inf"), "FP64", [float("inf")]),  # the server says what is wrong with it
        ("controlnet_conditioning_scale", [0.5, 1], "FP64", [0.5, 1.0]),
        ("guess_mode", True, "BOOL", [True]),
        ("seed", 3, "INT64", [3]),
        ("seed", [1, -2], "INT64", [1, -2]),
        ("seed", 2**64 - 1, "INT64", [-1]),  # the same 64 bits for torch's manual_seed
        ("ip_adapter_start", 0.2, "FP64", [0.2]),
        ("ip_adapter_weight_type", ["style", "linear"], "BYTES", [b"style", b"linear"]),
    ],
)
def test_values_get_the_type_that_the_model_names(
    sent: Any, parameter: str, value: Any, dtype: str, expected: list[Any]
) -> None:
    call = sent(**{parameter: value})
    assert call.dtypes[parameter] == dtype
    assert call.inputs[parameter].tolist() == expected


def test_dicts_become_json(sent: Any) -> None:
    call = sent(scheduler_config={"use_karras_sigmas": True, "steps_offset": np.int64(1)})
    assert json.loads(call.inputs["scheduler_config"][0]) == {"use_karras_sigmas": True, "steps_offset": 1}


def test_a_configuration_of_diffusers_goes_as_it_is(sent: Any) -> None:
    config = dict(DPMSolverMultistepScheduler(trained_betas=np.linspace(1e-4, 0.02, 10)).config)
    assert config["lambda_min_clipped"] == -math.inf
    given = {**config, "a": (np.float32(0.5), None), "b": np.float64("inf")}
    received = json.loads(sent(scheduler_config=given).inputs["scheduler_config"][0])
    assert received.pop("trained_betas") == config.pop("trained_betas").tolist()
    assert received.pop("a") == [0.5, None]
    assert received.pop("b") == math.inf
    assert received == json.loads(json.dumps(config))


def test_none_is_not_given(sent: Any) -> None:
    assert sent(height=None, ip_adapter_image=None, timeout=None).inputs.keys() == {"prompt"}


@pytest.mark.parametrize(("output_type", "wire"), [("pil", None), ("np", None), ("latent", b"latent")])
def test_output_type_is_the_clients_own_but_for_latents(sent: Any, output_type: str, wire: bytes | None) -> None:
    assert sent(output_type=output_type).inputs.get("output_type", [None])[0] == wire


# Wrong values


@pytest.mark.parametrize(
    ("parameter", "value", "message"),
    [
        ("height", "64", "height: takes whole numbers, got '64'"),
        ("height", 64.0, "height: takes whole numbers, got 64.0"),
        ("height", True, "height: takes whole numbers, got True"),
        ("height", [64, 64], "height: takes one value, got 2"),
        ("height", 2**40, "height: takes -2147483648 to 2147483647"),
        ("original_size", [64], "original_size: takes the shape [2], got [1]"),
        ("guidance_scale", "strong", "guidance_scale: takes numbers, got 'strong'"),
        ("guidance_scale", {"a": 1}, "guidance_scale: takes numbers"),
        ("controlnet_conditioning_scale", [[1.0], [1.0, 2.0]], "controlnet_conditioning_scale: takes numbers"),
        ("guess_mode", 1, "guess_mode: takes true or false, got 1"),
        ("seed", 2**64, "seed: takes -2**63 to 2**64 - 1"),
        ("seed", 0.5, "seed: takes whole numbers"),
        ("prompt", 3, "prompt: takes text (or a list), got int"),
        ("scheduler", ["A", "B"], "scheduler: takes one value, got 2"),
        ("scheduler_config", {"a": float("nan")}, "scheduler_config: must be plain JSON values"),
        ("scheduler_config", {"a": object()}, "scheduler_config: must be plain JSON values"),
        ("output_type", "pt", "output_type: one of pil, np, latent; got 'pt'"),
        ("timeout", 0, "timeout: seconds, more than 0; got 0"),
        ("timeout", "1", "timeout: seconds, more than 0; got '1'"),
        ("timeout", float("nan"), "timeout: seconds, more than 0"),
        ("image", 3, "image: a picture is a PIL image, a path"),
        ("image", "nowhere.png", "image: no such file: nowhere.png"),
        ("image", "https://example.com/a.png", "image: https://example.com/a.png is a web address"),
        ("image", "/", "image: / cannot be read"),
        ("image", np.zeros((4, 4, 3)), "image: an array is uint8"),
        ("image", np.zeros((3, 5, 5), np.uint8), "image: an array is uint8"),
        ("image", np.zeros((0, 4, 3), np.uint8), "image: an array is uint8"),
        ("mask_image", np.full((4, 4), 2.0), "mask_image: a mask of floats is 0 to 1"),
        ("ip_adapter_image", [RED], "ip_adapter_image: an entry for each of plus, face, or a dict"),
        ("ip_adapter_image", {"pluss": RED}, "ip_adapter_image: no adapter 'pluss'; the bundle has plus, face"),
        ("ip_adapter_image_embeds", {"plus": np.zeros((2, 1, 5), np.float32)}, "plus: takes the shape [any, any, 8]"),
        ("ip_adapter_image_embeds", {"plus": ["a"]}, "ip_adapter_image_embeds: plus: takes numbers"),
        ("ip_adapter_scale", "strong", "ip_adapter_scale: numbers, dicts by block and lists of them; got 'strong'"),
        ("ip_adapter_scale", {"up": "a"}, "ip_adapter_scale: numbers, dicts by block"),
        ("ip_adapter_scale", [{}, {}, {}], "ip_adapter_scale: one, or one for each of the 2 adapters in use; got 3"),
        ("ip_adapter_scale", {"up": float("nan")}, "ip_adapter_scale: must be plain JSON values"),
        ("ip_adapter_start", {"plus": 0.5}, "ip_adapter_start: none given for face"),
        ("ip_adapter_start", {"up": 0.5}, "ip_adapter_start: no adapter 'up'"),
    ],
)
def test_a_wrong_value_is_refused_before_anything_is_sent(
    sent: Any, triton: FakeTriton, parameter: str, value: Any, message: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        sent(**{parameter: value})
    assert message in str(caught.value)
    assert caught.value.parameter == parameter
    assert not triton.calls


@pytest.mark.parametrize(
    ("parameter", "hint"),
    [
        ("guidance", "did you mean guidance_scale"),
        ("ip_adapter_imge", "did you mean ip_adapter_image"),
        ("hight", "did you mean height?"),
        ("step", "did you mean num_inference_steps?"),
        ("inference_steps", "did you mean num_inference_steps?"),
        ("timesteps", "did you mean num_inference_steps or scheduler_config?"),
        ("sigmas", "did you mean num_inference_steps or scheduler_config?"),
        ("cfg_scale", "did you mean guidance_scale?"),
        ("sampler", "did you mean scheduler?"),
        ("seeds", "did you mean seed?"),
        ("frame", "did you mean num_frames?"),
        ("prompts", "did you mean prompt"),
        ("size", "did you mean height or width"),
        ("ip_adapter_image_embedding", "ip_adapter_image_embeds"),
        ("generator", "`seed`"),
        ("cross_attention_kwargs", "`ip_adapter_masks`"),
        ("zzz", "two has no such parameter; `help(imprompt.Client)` and docs/protocol.md list them all"),
        ("time", "has no such parameter; `help(imprompt.Client)`"),
        ("ip_adapter_image_adapter", "has no such parameter"),
        ("encode_image", "has no such parameter"),
    ],
)
def test_an_unknown_parameter_is_named(sent: Any, triton: FakeTriton, parameter: str, hint: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        sent(**{parameter: 1})
    assert caught.value.parameter == parameter
    assert hint in str(caught.value)
    assert not triton.calls


def test_a_model_that_knows_less_decides_what_is_known(triton: FakeTriton, sent: Any) -> None:
    for name in ("ip_adapter_scale_config", "output_type"):
        known = [tensor for tensor in triton.configs["one"].input if tensor.name != name]
        del triton.configs["one"].input[:]
        triton.configs["one"].input.extend(known)
    with pytest.raises(InvalidRequest, match="ip_adapter_scale: one takes numbers only"):
        sent("one", ip_adapter_scale={"up": 1.0})
    with pytest.raises(InvalidRequest, match="output_type: one gives no latents"):
        sent("one", output_type="latent")


# Pictures


def test_files_and_bytes_are_sent_as_they_are(sent: Any, tmp_path: Path) -> None:
    path = tmp_path / "red.jpg"
    RED.save(path)
    call = sent(image=[path, str(path), path.read_bytes()])
    assert call.inputs["image"].tolist() == [path.read_bytes()] * 3


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_pil_images_keep_their_mode(sent: Any, mode: str) -> None:
    (image,) = pictures(sent(image=RED.convert(mode)), "image")
    assert (image.format, image.mode, image.size) == ("PNG", mode, RED.size)


def test_other_modes_become_rgb(sent: Any) -> None:
    (image,) = pictures(sent(image=RED.convert("CMYK")), "image")
    assert image.mode == "RGB"


@pytest.mark.parametrize(
    ("array", "mode"),
    [
        (np.full((2, 4, 3), 9, np.uint8), "RGB"),
        (np.full((2, 4, 4), 9, np.uint8), "RGBA"),
        (np.full((2, 4, 1), 9, np.uint8), "L"),
        (np.full((2, 4), 9, np.uint8), "L"),
        (torch.full((2, 4, 3), 9, dtype=torch.uint8), "RGB"),
    ],
)
def test_arrays_are_height_width_channels(sent: Any, array: Any, mode: str) -> None:
    (image,) = pictures(sent(image=array), "image")
    assert (image.mode, image.size) == (mode, (4, 2))
    assert np.array_equal(np.asarray(image), np.asarray(array).reshape(np.asarray(image).shape))


def test_lists_and_stacked_arrays_are_several_pictures(sent: Any) -> None:
    frames = np.stack([np.asarray(RED), np.asarray(BLUE)])
    assert colors(sent(video=frames), "video") == colors(sent(video=[RED, BLUE]), "video") == [(255, 0, 0), (0, 0, 255)]


def test_control_images_in_lists_of_lists(sent: Any) -> None:
    """For clips an inner list is a net's frames, for pictures a prompt's images, as in diffusers; the wire has nets."""
    frames = sent(control_image=[[RED, RED, BLUE], [BLUE, BLUE, RED]], num_frames=3)
    prompts = sent(control_image=[[RED, BLUE], [RED, BLUE], [BLUE, RED]])
    red, blue = (255, 0, 0), (0, 0, 255)
    assert colors(frames, "control_image") == colors(prompts, "control_image") == [red, red, blue, blue, blue, red]
    with pytest.raises(InvalidRequest, match=r"control_image: an image for each net in every list; got \[2, 1\]"):
        sent(control_image=[[RED, BLUE], [RED]])


def test_masks_keep_their_mode(sent: Any) -> None:
    for mode in ("1", "L", "P", "RGB"):
        (image,) = pictures(sent(mask_image=Image.new("L", (4, 2), 255).convert(mode)), "mask_image")
        assert image.mode == mode


def test_masks_of_numbers_are_grey(sent: Any) -> None:
    for mask in (np.full((2, 4), 255, np.uint8), np.ones((2, 4), np.float32), np.ones((2, 4), bool)):
        (image,) = pictures(sent(mask_image=mask), "mask_image")
        assert (image.mode, image.getpixel((0, 0))) == ("L", 255)


# Image prompts


@pytest.mark.parametrize(
    ("model", "value", "expected"),
    [
        ("one", RED, [("plain", "red")]),
        ("one", [RED, BLUE], [("plain", "red"), ("plain", "blue")]),
        ("one", [[RED, BLUE]], [("plain", "red"), ("plain", "blue")]),
        ("one", {"plain": [RED]}, [("plain", "red")]),
        ("two", [RED, BLUE], [("plus", "red"), ("face", "blue")]),
        ("two", [[RED, BLUE], RED], [("plus", "red"), ("plus", "blue"), ("face", "red")]),
        ("two", [None, [RED]], [("face", "red")]),
        ("two", {"face": RED, "plus": [BLUE]}, [("plus", "blue"), ("face", "red")]),
        ("two", {"face": RED}, [("face", "red")]),
    ],
)
@pytest.mark.parametrize("parameter", ["ip_adapter_image", "negative_ip_adapter_image"])
def test_pictures_find_their_adapter(
    sent: Any, parameter: str, model: str, value: Any, expected: list[tuple[str, str]]
) -> None:
    call = sent(model, **{parameter: value})
    names = {(255, 0, 0): "red", (0, 0, 255): "blue"}
    found = [names[color] for color in colors(call, parameter)]
    assert list(zip(call.texts(f"{parameter}_adapter"), found, strict=True)) == expected


def test_a_bundle_without_adapters_says_so(sent: Any) -> None:
    with pytest.raises(InvalidRequest, match="ip_adapter_image: none has no IP-Adapter"):
        sent("none", ip_adapter_image=RED)


@pytest.mark.parametrize(
    ("model", "value", "expected"),
    [
        ("one", embeds(1), {"plain": 1}),
        ("one", torch.full((2, 1, EMBED_SIZE), 1.0, dtype=torch.bfloat16, requires_grad=True), {"plain": 1}),
        ("one", [embeds(1)], {"plain": 1}),
        ("one", embeds(1).astype(np.float64)[:1], {"plain": 1}),
        ("two", [embeds(1), embeds(2, pictures=3)], {"plus": 1, "face": 2}),
        ("two", [None, embeds(2)], {"face": 2}),
        ("two", {"face": embeds(2), "plus": embeds(1)}, {"plus": 1, "face": 2}),
    ],
)
def test_embeddings_find_their_adapter(sent: Any, model: str, value: Any, expected: dict[str, float]) -> None:
    call = sent(model, ip_adapter_image_embeds=value)
    found = {name: array for name, array in call.inputs.items() if name.startswith("ip_adapter_image_embeds")}
    assert {name.rpartition("_")[2]: array.max() for name, array in found.items()} == expected
    assert all(array.dtype == np.float32 and array.shape[-1] == EMBED_SIZE for array in found.values())


BLOCKS = {"up": {"block_0": [0.0, 1.0, 0.0]}}


@pytest.mark.parametrize(
    ("model", "used", "value", "expected"),
    [
        ("one", ["plain"], 0.5, [0.5]),
        ("one", ["plain"], [0.5], [0.5]),
        ("two", ["plus", "face"], 0.5, [0.5]),
        ("two", ["plus", "face"], [0.5, 0.6], [0.5, 0.6]),
        ("two", ["plus", "face"], np.array([0.5, 0.6]), [0.5, 0.6]),
        ("two", ["plus", "face"], {"face": 0.6, "plus": 0.5}, [0.5, 0.6]),
        ("two", ["plus", "face"], {"face": 0.6}, [1.0, 0.6]),
        ("two", ["face"], {"face": 0.6, "plus": 0.5}, [0.6]),
        ("two", ["face"], [0.5, 0.6], [0.6]),
        ("two", [], {"face": 0.6, "plus": 0.5}, [0.5, 0.6]),
        ("two", ["face"], [0.1, 0.2, 0.3], [0.1, 0.2, 0.3]),  # the server says what is wrong with it
        ("one", ["plain"], BLOCKS, json.dumps([BLOCKS])),
        ("two", ["plus", "face"], BLOCKS, json.dumps([BLOCKS, BLOCKS])),
        ("two", ["plus", "face"], [0.5, BLOCKS], json.dumps([0.5, BLOCKS])),
        ("two", ["plus", "face"], {"face": BLOCKS, "plus": 1}, json.dumps([1.0, BLOCKS])),
        ("two", ["face"], {"face": BLOCKS}, json.dumps([BLOCKS])),
        ("one", ["plain"], [[0.7, 0.3]], json.dumps([[0.7, 0.3]])),
        ("two", ["plus", "face"], {"plus": (np.float32(0.5), 1), "face": 1}, json.dumps([[0.5, 1.0], 1.0])),
    ],
)
def test_scales_are_put_in_the_order_of_the_adapters(
    sent: Any, model: str, used: list[str], value: Any, expected: Any
) -> None:
    call = sent(model, ip_adapter_image=dict.fromkeys(used, RED), ip_adapter_scale=value)
    if isinstance(expected, str):
        assert call.texts("ip_adapter_scale_config") == [expected]
        assert "ip_adapter_scale" not in call.inputs
    else:
        assert call.inputs["ip_adapter_scale"].tolist() == expected
        assert "ip_adapter_scale_config" not in call.inputs


def test_values_by_adapter_name_are_put_in_order(sent: Any) -> None:
    call = sent(
        ip_adapter_image=[RED, RED],
        ip_adapter_start={"face": 0.5, "plus": 0.0},
        ip_adapter_weight_type={"face": "style", "plus": "linear"},
    )
    assert call.inputs["ip_adapter_start"].tolist() == [0.0, 0.5]
    assert call.texts("ip_adapter_weight_type") == ["linear", "style"]


LEFT, RIGHT = np.zeros((2, 2, 4), np.float32)
LEFT[:, :2], RIGHT[:, 2:] = 1, 1


@pytest.mark.parametrize(
    ("model", "value", "adapters"),
    [
        ("one", [Image.fromarray((LEFT * 255).astype(np.uint8)), RIGHT], ["plain", "plain"]),
        ("one", [torch.tensor(np.stack([LEFT, RIGHT]))[None]], ["plain", "plain"]),
        ("one", np.stack([LEFT, RIGHT])[:, None], ["plain", "plain"]),
        ("one", [np.stack([LEFT, RIGHT])], ["plain", "plain"]),
        ("two", [[LEFT], [RIGHT]], ["plus", "face"]),
        ("two", [np.stack([LEFT, RIGHT])[None], None], ["plus", "plus"]),
        ("two", {"face": [LEFT, RIGHT]}, ["face", "face"]),
    ],
)
def test_masks_find_their_adapter(sent: Any, model: str, value: Any, adapters: list[str]) -> None:
    call = sent(model, ip_adapter_masks=value)
    assert call.texts("ip_adapter_masks_adapter") == adapters
    masks = pictures(call, "ip_adapter_masks")
    assert [mask.mode for mask in masks] == ["L", "L"]
    assert all(
        np.array_equal(np.asarray(mask), wanted * 255) for mask, wanted in zip(masks, (LEFT, RIGHT), strict=True)
    )


def test_encode_image_asks_for_one_adapters_embeddings(client: Client, triton: FakeTriton) -> None:
    triton.answer = lambda call: iter([{"image_embeds_face": embeds(0.5, pictures=2)}])
    found = client.encode_image("two", "face", [RED, GREY])
    call = triton.calls[-1]
    assert (call.texts("encode_image"), call.texts("prompt")) == (["face"], [""])
    assert call.texts("ip_adapter_image_adapter") == ["face", "face"]
    assert found.shape == (2, 2, EMBED_SIZE)
    found += 1  # the caller's own
    with pytest.raises(InvalidRequest, match="adapter: no adapter 'fase'; the bundle has plus, face; did you mean"):
        client.encode_image("two", "fase", RED)


def test_what_is_left_of_a_short_timeout_is_never_less_than_a_server_takes() -> None:
    timeout = Input(name="timeout", dtype="FP64", dims=(1,))
    request = Request(model="x", bundle="x", id="1", tensors=(), output_type="pil", clip=False, timeout_input=timeout)
    assert np.frombuffer(request.message(1e-7).raw_input_contents[0]) == [1e-3]
