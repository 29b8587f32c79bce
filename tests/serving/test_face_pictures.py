"""FaceID from pictures of people: the same embeddings as insightface, and the same pictures as the diffusers guide."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

import bundles
from imprompt import InvalidRequest
from imprompt_serving import errors
from imprompt_serving.pipeline.models import strings
from imprompt_serving.pipeline.request import parse
from imprompt_serving.specs import Bundle
from parity import assert_different, assert_same
from served import Served
from tiny import images, oracle
from tiny.faces import people

needs_insightface = pytest.mark.skipif(not bundles.FACES, reason="needs insightface: install imprompt[face]")
SMALL: dict[str, Any] = {"prompt": "a photo of a cat", "num_inference_steps": 4}
ANNA, BERT = people((0.5, 0.5, 0.3), seed=1), people((0.4, 0.6, 0.25), seed=2, size=(128, 96))
CROWD = people((0.2, 0.25, 0.12), (0.75, 0.7, 0.22), seed=7)
NOBODY = people(seed=4)
TWO_MASKS = {"portrait": [images.mask("left"), images.mask("right")]}


@pytest.fixture(scope="module")
def face(served: Any) -> Served:
    return served("sd15_face")


@pytest.fixture(scope="module")
def app(face: Served) -> Any:
    """insightface with the models in the user's folder, prepared as in the guide."""
    from insightface.app import FaceAnalysis

    app = FaceAnalysis(name=str(face.bundle.checkpoints / "buffalo"), providers=["CPUExecutionProvider"])
    app.prepare(ctx_id=0, det_size=(128, 128), det_thresh=0.8)
    return app


def seen(app: Any, picture: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Return embedding and crop of the largest face, with the code of the guide, which takes the first face."""
    import cv2
    from insightface.utils import face_align

    image = cv2.cvtColor(np.asarray(picture), cv2.COLOR_BGR2RGB)
    largest = max(app.get(image), key=lambda found: np.prod(found.bbox[2:] - found.bbox[:2]))
    return largest.normed_embedding, face_align.norm_crop(image, landmark=largest.kps, image_size=224)


def with_negative(*embeddings: np.ndarray) -> np.ndarray:
    """Return embeddings [2 (negative, positive), faces, 1, 512]."""
    positive = np.stack(embeddings)[:, None]
    return np.stack([np.zeros_like(positive), positive])


@needs_insightface
@pytest.mark.parametrize("adapter", ["portrait", "plus_face"])
def test_embedding_equals_that_of_insightface(face: Served, app: Any, adapter: str) -> None:
    embeds = face.client.encode_image("sd15_face", adapter, [ANNA, BERT])
    assert embeds.shape == (2, 2, 1, 512)
    np.testing.assert_array_equal(embeds, with_negative(seen(app, ANNA)[0], seen(app, BERT)[0]))


@needs_insightface
def test_picture_gives_the_same_result_as_its_embedding(face: Served, app: Any) -> None:
    embeds = with_negative(seen(app, ANNA)[0], seen(app, BERT)[0])
    pipe = face.pipe
    pipe.set_ip_adapter_scale([0.6, 0.0])
    oracle.show_face(pipe, [ANNA], adapter=1, shortcut=True)
    ours = torch.from_numpy(embeds[:, :, 0])
    expected = oracle.generate(pipe, ip_adapter_image_embeds=[ours, images.face_embeds(1)], **SMALL)
    arguments = {**SMALL, "ip_adapter_scale": 0.6, "seed": 0}
    result = face.generate(**arguments, ip_adapter_image={"portrait": [ANNA, BERT]})
    assert_same(result, expected)
    assert_same(result, _pictures(face.generate(**arguments, ip_adapter_image_embeds={"portrait": embeds})))
    assert_different(result, face.generate(**arguments, ip_adapter_image={"portrait": ANNA}))


@needs_insightface
@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
def test_face_plus_also_uses_the_crop(face: Served, app: Any, guidance_scale: float) -> None:
    guidance = guidance_scale > 1
    embedding, crop = seen(app, BERT)
    embeds = torch.from_numpy(with_negative(embedding)[:, :, 0])[0 if guidance else 1 :]
    arguments = {**SMALL, "guidance_scale": guidance_scale}
    pipe = face.pipe
    pipe.set_ip_adapter_scale([0.0, 0.7])
    oracle.show_face(pipe, [crop], adapter=1, shortcut=True, guidance=guidance)  # type: ignore[list-item]
    expected = oracle.generate(pipe, ip_adapter_image_embeds=[embeds, embeds], **arguments)
    arguments |= {"ip_adapter_scale": 0.7, "seed": 0}
    result = face.generate(**arguments, ip_adapter_image={"plus_face": BERT})
    assert_same(result, expected)
    assert_different(result, face.generate(**arguments, ip_adapter_image={"plus_face": ANNA}))
    given = {"plus_face": with_negative(embedding)}
    uncropped = face.generate(**arguments, ip_adapter_image_embeds=given, ip_adapter_image={"plus_face": BERT})
    with pytest.raises(AssertionError):
        assert_same(uncropped, expected)


@needs_insightface
def test_both_adapters_with_masks(face: Served, app: Any) -> None:
    arguments: dict[str, Any] = {**SMALL, "ip_adapter_scale": [[0.8, 0.8], 0.5], "seed": 0}
    arguments["ip_adapter_masks"] = TWO_MASKS
    embedding, crop = seen(app, CROWD)
    found = face.generate(**arguments, ip_adapter_image={"portrait": [ANNA, BERT], "plus_face": CROWD})
    given = face.generate(
        **arguments,
        ip_adapter_image={"plus_face": Image.fromarray(crop)},
        ip_adapter_image_embeds={
            "portrait": with_negative(seen(app, ANNA)[0], seen(app, BERT)[0]),
            "plus_face": with_negative(embedding),
        },
    )
    assert_same(found, _pictures(given))


@needs_insightface
def test_largest_of_several_faces_is_used(face: Served, app: Any) -> None:
    found = app.get(np.asarray(CROWD)[..., ::-1].copy())
    assert len(found) == 2
    first, largest = found[0].normed_embedding, seen(app, CROWD)[0]
    assert not np.allclose(first, largest)
    embeds = face.client.encode_image("sd15_face", "portrait", [CROWD])
    np.testing.assert_array_equal(embeds, with_negative(largest))


@needs_insightface
def test_photo_is_rotated_by_its_exif_orientation(face: Served, app: Any, tmp_path: Path) -> None:
    turned = ANNA.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: rotate clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    embeds = face.client.encode_image("sd15_face", "portrait", [tmp_path / "turned.png"])
    np.testing.assert_array_equal(embeds, with_negative(seen(app, ANNA)[0]))


@needs_insightface
@pytest.mark.parametrize(
    ("parameter", "message", "arguments"),
    [
        ("ip_adapter_image", "picture 2 of 3", {"ip_adapter_image": {"portrait": [ANNA, NOBODY, BERT]}}),
        ("ip_adapter_image", "picture 1 of 1", {"ip_adapter_image": {"plus_face": NOBODY}}),
        (
            "ip_adapter_image",
            "not a PNG, JPEG, WebP, GIF, BMP or AVIF picture",
            {"ip_adapter_image": {"portrait": b"this is text"}},
        ),
        (
            "negative_ip_adapter_image",
            "zeros",
            {"ip_adapter_image": {"portrait": ANNA}, "negative_ip_adapter_image": {"portrait": BERT}},
        ),
        ("ip_adapter_masks", "2 masks", {"ip_adapter_image": {"portrait": ANNA}, "ip_adapter_masks": TWO_MASKS}),
        (
            "ip_adapter_image_embeds",
            "both",
            {
                "ip_adapter_image": {"portrait": ANNA},
                "ip_adapter_image_embeds": {"portrait": images.face_embeds(1)},
            },
        ),
    ],
)
def test_refusals_of_pictures_name_the_parameter(
    face: Served, parameter: str, message: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        face.generate(**SMALL, **arguments)
    assert caught.value.parameter == parameter


@needs_insightface
def test_encode_image_refuses_a_picture_without_a_face(face: Served) -> None:
    with pytest.raises(InvalidRequest, match="portrait: no face found in picture 1 of 1"):
        face.client.encode_image("sd15_face", "portrait", [NOBODY])


@needs_insightface
def test_capabilities_report_face_detection(face: Served) -> None:
    reported = {
        a["name"]: (a["takes_images"], a["finds_faces"]) for a in face.client.describe("sd15_face")["ip_adapters"]
    }
    assert reported == {"portrait": (True, True), "plus_face": (True, True)}


def test_bundles_without_a_face_encoder_require_embeddings(bundle: Any) -> None:
    described = Bundle.load(bundle("sd15_face").repository / "sd15_face/1")
    picture = io.BytesIO()
    ANNA.save(picture, "PNG")
    request = {
        "prompt": strings("a cat"),
        "ip_adapter_image": strings(picture.getvalue()),
        "ip_adapter_image_adapter": strings("portrait"),
    }
    with pytest.raises(errors.InvalidRequest, match="the bundle has no face_encoder") as caught:
        parse(request, msgspec.structs.replace(described, face_encoder=None))
    assert caught.value.parameter == "ip_adapter_image_embeds"


def _pictures(result: Any) -> np.ndarray:
    return np.stack([np.asarray(image) for image in result.images])
