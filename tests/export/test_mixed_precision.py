"""What is not int8 may be rounded to bf16, but timesteps and sizes stay exact."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from imprompt_export.mixed_precision import save_for_bf16
from imprompt_serving.backends import get_backend
from imprompt_serving.backends import openvino as served_openvino

openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed: imprompt[openvino]")

FREQUENCIES = np.array([[1.0, 0.1]], np.float32)
WEIGHTS, MORE_WEIGHTS = np.random.default_rng(0).standard_normal((2, 4, 4)).astype(np.float32)
VALUES = np.array([[999, 1000, 1001], [513, 777, 1]], np.float32)
"""Rounded to bf16, the first row is three times 1000."""


def save(folder: Path, shape: tuple[int, ...]) -> Path:
    """Save the sinusoidal embedding of timesteps [B] or of several sizes [B, N], and two matrix products after it."""
    from openvino import opset13 as opset

    given = opset.parameter(shape, np.float32)
    angles = opset.multiply(opset.unsqueeze(opset.reshape(given, [-1], special_zero=False), 1), FREQUENCIES)
    embedded = opset.matmul(opset.concat([opset.sin(angles), opset.cos(angles)], 1), WEIGHTS, False, False)
    result = opset.result(opset.matmul(embedded, MORE_WEIGHTS, False, False))
    given.output(0).set_names({"values"})
    result.output(0).set_names({"embedding"})
    save_for_bf16(openvino.Model([result], [given], "embedding"), folder / "model.xml")
    return folder / "model.xml"


def exact_embedding(values: np.ndarray) -> np.ndarray:
    """Return in float64 what the saved network computes for `values`."""
    angles = values.reshape(-1, 1).astype(float) * FREQUENCIES
    return np.concatenate([np.sin(angles), np.cos(angles)], 1) @ WEIGHTS @ MORE_WEIGHTS


@pytest.mark.parametrize("values", [VALUES.ravel(), VALUES], ids=["timesteps", "sizes"])
def test_timesteps_and_sizes_are_not_rounded(tmp_path: Path, values: np.ndarray) -> None:
    file = save(tmp_path, (-1, *values.shape[1:]))
    embedding = get_backend("openvino").load(file).run({"values": values})["embedding"]
    error = np.abs(embedding - exact_embedding(values)).max()
    assert error < 0.1
    assert (error > 1e-3) == served_openvino.has_bf16()


def test_exactness_does_not_depend_on_this_cpu(tmp_path: Path) -> None:
    """OpenVINO forgets that an operation is exact when it replaces it, as it does with two reshapes in a row."""
    layers = ElementTree.parse(save(tmp_path, (-1,))).findall("layers/layer")
    exact = [layer.get("type") for layer in layers if layer.find("rt_info/attribute[@name='precise']") is not None]
    assert sorted(filter(None, exact)) == ["Cos", "Multiply", "Reshape", "Sin"]


def test_other_models_are_only_rounded_on_request(tmp_path: Path) -> None:
    file = save(tmp_path, (-1,))
    file.write_text(file.read_text().replace("round_to_bf16", "anything_else"))
    for rounded in (False, True):
        engine = served_openvino.OpenVinoEngine(file, round_to_bf16=rounded)
        error = np.abs(engine.run({"values": VALUES.ravel()})["embedding"] - exact_embedding(VALUES)).max()
        assert (error > 1e-3) == (rounded and served_openvino.has_bf16())
