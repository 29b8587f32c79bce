"""Making control images from photos."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from imprompt_serving.errors import InvalidRequest
from imprompt_serving.pipeline.annotators import annotate


def test_none_returns_the_picture_unchanged() -> None:
    picture = Image.new("RGB", (8, 8), "red")
    assert annotate(picture, "none") is picture


def test_canny_draws_edges_in_white_on_black() -> None:
    pytest.importorskip("cv2", reason="needs the extra `annotators`")
    picture = Image.new("RGB", (32, 32), "black")
    picture.paste("white", (8, 8, 24, 24))
    edges = np.asarray(annotate(picture, "canny"))
    assert edges.shape == (32, 32, 3)
    assert set(np.unique(edges)) == {0, 255}
    assert edges[12:20, 12:20].max() == 0
    assert edges[16, 6:10].max() == 255


def test_without_opencv_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(InvalidRequest, match=r"control_image_annotator: canny: .*imprompt\[annotators\]"):
        annotate(Image.new("RGB", (8, 8)), "canny")
