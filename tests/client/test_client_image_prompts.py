"""Image prompts: adapters, masks, scales and embeddings as the server receives them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from fake_triton import EMBED_SIZE, FakeTriton
from PIL import Image

from imprompt import Client, InvalidRequest
from imprompt._model import Input
from imprompt._request import Request

RED = Image.new("RGB", (4, 2), "red")
BLUE = Image.new("RGB", (4, 2), "blue")
GREY = Image.new("L", (4, 2), 100)


def embeds(value: float, pictures: int = 1) -> np.ndarray:
    return np.full((2, pictures, EMBED_SIZE), value, np.float32)


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
def test_pictures_are_assigned_to_adapters(
    sent: Any, parameter: str, model: str, value: Any, expected: list[tuple[str, str]]
) -> None:
    call = sent(model, **{parameter: value})
    names = {(255, 0, 0): "red", (0, 0, 255): "blue"}
    found = [names[color] for color in call.colors(parameter)]
    assert list(zip(call.texts(f"{parameter}_adapter"), found, strict=True)) == expected


def test_error_for_a_bundle_without_adapters(sent: Any) -> None:
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
def test_embeddings_are_assigned_to_adapters(sent: Any, model: str, value: Any, expected: dict[str, float]) -> None:
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
        ("two", ["face"], [0.1, 0.2, 0.3], [0.1, 0.2, 0.3]),  # left to the server to reject
        ("one", ["plain"], BLOCKS, json.dumps([BLOCKS])),
        ("two", ["plus", "face"], BLOCKS, json.dumps([BLOCKS, BLOCKS])),
        ("two", ["plus", "face"], [0.5, BLOCKS], json.dumps([0.5, BLOCKS])),
        ("two", ["plus", "face"], {"face": BLOCKS, "plus": 1}, json.dumps([1.0, BLOCKS])),
        ("two", ["face"], {"face": BLOCKS}, json.dumps([BLOCKS])),
        ("one", ["plain"], [[0.7, 0.3]], json.dumps([[0.7, 0.3]])),
        ("two", ["plus", "face"], {"plus": (np.float32(0.5), 1), "face": 1}, json.dumps([[0.5, 1.0], 1.0])),
    ],
)
def test_scales_follow_the_order_of_the_adapters(
    sent: Any, model: str, used: list[str], value: Any, expected: Any
) -> None:
    call = sent(model, ip_adapter_image=dict.fromkeys(used, RED), ip_adapter_scale=value)
    if isinstance(expected, str):
        assert call.texts("ip_adapter_scale_config") == [expected]
        assert "ip_adapter_scale" not in call.inputs
    else:
        assert call.inputs["ip_adapter_scale"].tolist() == expected
        assert "ip_adapter_scale_config" not in call.inputs


def test_values_keyed_by_adapter_follow_the_order_of_the_adapters(sent: Any) -> None:
    call = sent(
        ip_adapter_image=[RED, RED],
        ip_adapter_start={"face": 0.5, "plus": 0.0},
        ip_adapter_weight_type={"face": "style", "plus": "linear"},
        ip_adapter_image_per={"face": "request", "plus": "frame"},
        ip_adapter_keyframes=[0, 8],
    )
    assert call.texts("ip_adapter_image_per") == ["frame", "request"]
    assert call.inputs["ip_adapter_keyframes"].tolist() == [0, 8]
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
def test_masks_are_assigned_to_adapters(sent: Any, model: str, value: Any, adapters: list[str]) -> None:
    call = sent(model, ip_adapter_masks=value)
    assert call.texts("ip_adapter_masks_adapter") == adapters
    masks = call.pictures("ip_adapter_masks")
    assert [mask.mode for mask in masks] == ["L", "L"]
    assert all(
        np.array_equal(np.asarray(mask), wanted * 255) for mask, wanted in zip(masks, (LEFT, RIGHT), strict=True)
    )


def test_encode_image_requests_embeddings_of_one_adapter(client: Client, triton: FakeTriton) -> None:
    triton.answer = lambda call: iter([{"image_embeds_face": embeds(0.5, pictures=2)}])
    found = client.encode_image("two", "face", [RED, GREY])
    call = triton.calls[-1]
    assert (call.texts("encode_image"), call.texts("prompt")) == (["face"], [""])
    assert call.texts("ip_adapter_image_adapter") == ["face", "face"]
    assert found.shape == (2, 2, EMBED_SIZE)
    found += 1  # the array is writable
    with pytest.raises(InvalidRequest, match="adapter: no adapter 'fase'; the bundle has plus, face; did you mean"):
        client.encode_image("two", "fase", RED)


def test_timeout_sent_is_never_below_the_servers_minimum() -> None:
    timeout = Input(name="timeout", dtype="FP64", dims=(1,))
    request = Request(model="x", bundle="x", id="1", tensors=(), output_type="pil", clip=False, timeout_input=timeout)
    assert np.frombuffer(request.message(1e-7).raw_input_contents[0]) == [1e-3]
