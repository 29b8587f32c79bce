"""An export frees the weights of each network once its engine is compared, and says how long each stage took."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imprompt_export.backends import export_backend
from imprompt_export.exporter import _drop_weights
from imprompt_export.graphs import Graph, Input
from imprompt_export.onnx_graph import export_onnx
from imprompt_export.parity import compare, references
from imprompt_export.sections import EngineSection
from imprompt_export.stages import Stages


def graph(module: nn.Module, name: str = "net") -> Graph:
    def run(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return (module(tensors["x"]),)

    return Graph(
        name=name,
        module=module,
        run=run,
        inputs=(Input(name="x", shape=("batch", 2)),),
        outputs={"y": ("batch", 2)},
        checks=({"batch": 1}, {"batch": 2}),
    )


def test_weights_stay_until_the_last_graph_that_has_them() -> None:
    vae, unet = nn.Linear(2, 2), nn.Linear(2, 2)
    encoder, decoder, denoiser = graph(vae), graph(nn.Sequential(vae)), graph(unet)
    _drop_weights(encoder, [decoder, denoiser])
    assert vae.weight.numel()
    _drop_weights(decoder, [denoiser])
    assert not vae.weight.numel()
    assert unet.weight.numel()


@pytest.mark.parametrize(
    ("backend", "precision", "kept"),
    [
        ("onnxruntime", "fp32", set()),
        ("openvino", "fp32", set()),
        ("openvino", "bf16", set()),
        ("openvino", "int8", {"text_encoder"}),
        ("inductor", "fp16", set()),
        ("inductor", "fp8", {"text_encoder", "image_encoder_plain", "vae_decoder", "unet", "image_projection_plain"}),
    ],
)
def test_weights_that_calibration_needs_stay(backend: str, precision: Any, kept: set[str]) -> None:
    engine = EngineSection(backend=backend, precision=precision)
    names = ("text_encoder", "image_encoder_plain", "vae_decoder", "unet", "image_projection_plain")
    made = {name: graph(nn.Linear(2, 2), name) for name in names}
    assert {name for name in names if not export_backend(backend).is_exported(engine, made[name])} == kept


def test_engines_are_compared_without_the_weights(tmp_path: Path) -> None:
    net, file, stages = graph(nn.Linear(2, 2)), tmp_path / "net.onnx", Stages()
    shown: list[str] = []
    stages.show = shown.append
    weight = next(net.module.parameters())
    export_onnx(net, file, torch.float32, stages)
    expected = references(net)
    _drop_weights(net, [])
    assert not weight.numel()
    assert [row.passed for row in compare(net, expected, file, "onnxruntime")] == [True, True]
    assert shown == [*stages.seconds] == ["tracing", "translating to ONNX", "writing"]
    assert re.fullmatch(r"tracing \d+\.\d s, translating to ONNX \d+\.\d s, writing \d+\.\d s", str(stages))
