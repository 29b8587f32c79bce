"""FaceID adapters with face embeddings: the same pictures as diffusers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from imprompt import InvalidRequest
from parity import assert_different, assert_same
from served import Served
from tiny import images, oracle

SMALL: dict[str, Any] = {"prompt": "a photo of a cat", "num_inference_steps": 4}
FACE = images.photo(1)


@pytest.fixture(scope="module")
def face(served: Any) -> Served:
    return served("sd15_face")


@pytest.mark.parametrize("faces", [1, 2])
def test_portrait_and_plus_adapters_together(face: Served, faces: int) -> None:
    """Both adapters as diffusers loads them, with the LoRA of the last one active."""
    pipe = face.pipe
    portrait, plus = images.face_embeds(faces, seed=3), images.face_embeds(faces, seed=4)
    crops = images.photos(faces, seed=30)
    pipe.set_ip_adapter_scale([0.5, 0.7])
    oracle.show_face(pipe, crops, adapter=1, shortcut=True)
    expected = oracle.generate(pipe, ip_adapter_image_embeds=[portrait, plus], **SMALL)
    arguments = {**SMALL, "ip_adapter_image_embeds": {"portrait": portrait, "plus_face": plus}, "seed": 0}
    result = face.generate(**arguments, ip_adapter_image={"plus_face": crops}, ip_adapter_scale=[0.5, 0.7])
    assert_same(result, expected)
    other = images.photos(faces, seed=40)
    changed = face.generate(**arguments, ip_adapter_image={"plus_face": other}, ip_adapter_scale=[0.5, 0.7])
    assert_different(result, changed)


def test_portrait_adapter_alone(face: Served) -> None:
    pipe = face.pipe
    embeds = images.face_embeds(2, seed=3)
    pipe.set_ip_adapter_scale([0.6, 0.0])
    oracle.show_face(pipe, [FACE], adapter=1, shortcut=True)
    expected = oracle.generate(pipe, ip_adapter_image_embeds=[embeds, images.face_embeds(1)], **SMALL)
    arguments = {**SMALL, "ip_adapter_scale": 0.6, "seed": 0}
    result = face.generate(**arguments, ip_adapter_image_embeds={"portrait": embeds})
    assert_same(result, expected)
    assert_different(result, face.generate(**arguments, ip_adapter_image_embeds={"portrait": images.face_embeds(2, 9)}))


def test_adapters_without_guidance(face: Served) -> None:
    pipe = face.pipe
    embeds = images.face_embeds(1, seed=3, guidance=False)
    pipe.set_ip_adapter_scale([0.0, 0.7])
    oracle.show_face(pipe, [FACE], adapter=1, shortcut=True, guidance=False)
    arguments = {**SMALL, "guidance_scale": 1.0}
    expected = oracle.generate(pipe, ip_adapter_image_embeds=[embeds, embeds], **arguments)
    result = face.generate(
        **arguments,
        ip_adapter_image_embeds={"plus_face": embeds},
        ip_adapter_image={"plus_face": FACE},
        ip_adapter_scale=0.7,
        seed=0,
    )
    assert_same(result, expected)


@pytest.mark.parametrize(
    ("parameter", "arguments"),
    [
        ("ip_adapter_image", {"ip_adapter_image_embeds": {"plus_face": images.face_embeds(1)}}),
        ("ip_adapter_image_embeds", {"ip_adapter_image_embeds": {"portrait": np.zeros((2, 1, 1, 128), np.float32)}}),
        (
            "ip_adapter_image",
            {
                "ip_adapter_image_embeds": {"plus_face": images.face_embeds(2)},
                "ip_adapter_image": {"plus_face": [FACE] * 3},
            },
        ),
    ],
)
def test_refusals_of_faces_name_the_parameter(face: Served, parameter: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        face.generate(**SMALL, **arguments)
    assert caught.value.parameter == parameter
