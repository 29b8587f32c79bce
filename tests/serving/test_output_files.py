"""Pictures and clips as files, and their form in a response."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from imprompt_bench import rig
from imprompt_serving.errors import InvalidRequest
from imprompt_serving.parameters import Settings
from imprompt_serving.pipeline.flow import _progress_message
from imprompt_serving.pipeline.models import strings
from imprompt_serving.pipeline.output_files import file_tensor
from imprompt_serving.pipeline.postprocess import _encode_files
from imprompt_serving.pipeline.request import parse

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 8, 16, 3), dtype=np.uint8)
BUNDLE = rig.sd15(rows=2)


def settings(**values: str) -> Settings:
    given = {name: strings(value) for name, value in {"prompt": "a", **values}.items()}
    return parse(given, BUNDLE).settings


def test_files_are_bytes_by_default() -> None:
    assert file_tensor([b"\x89PNG", b""], settings().output_encoding).tolist() == [b"\x89PNG", b""]


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_files_can_be_text(kind: str) -> None:
    wanted = settings(output_format=kind, output_encoding="base64")
    plain = _encode_files({"images": PIXELS}, settings(output_format=kind))["encoded"]
    result = _encode_files({"images": PIXELS, "nsfw_content_detected": np.zeros(2, bool)}, wanted)
    assert result.keys() == {"encoded", "nsfw_content_detected"}
    assert [base64.b64decode(text, validate=True) for text in result["encoded"]] == plain.tolist()
    assert Image.open(io.BytesIO(plain[0])).format == kind.upper()
    if kind == "png":
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(plain[1]))), PIXELS[1])


def test_previews_have_the_form_of_the_result() -> None:
    response = {"step": np.array([1]), "steps": np.array([2]), "latents": PIXELS, "preview": strings(b"\xff\xd8")}
    assert _progress_message(response, "base64")["preview"].tolist() == [b"/9g="]
    assert _progress_message(response, "binary")["preview"].tolist() == [b"\xff\xd8"]
    del response["preview"]
    assert _progress_message(response, "base64").keys() == {"step", "steps"}


def test_text_needs_files() -> None:
    with pytest.raises(InvalidRequest, match="output_encoding: base64 needs an output_format"):
        settings(output_encoding="base64")
    assert settings(output_encoding="binary").output_encoding == "binary"
