"""Attention is fused into one operator of ONNX Runtime with the same results, and nothing else is rewritten."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from imprompt_bench import rig
from imprompt_export.backends import export_backend
from imprompt_export.fused_attention import DOMAIN, fuse_attention
from imprompt_export.graphs import Graph, Input
from imprompt_export.image_prompt import AdapterPrompts, ImagePromptProcessor, ImagePrompts
from imprompt_export.onnx_graph import export_onnx
from imprompt_export.sections import EngineSection
from imprompt_serving.backends import get_backend


class Block(nn.Module):
    """Self-attention of diffusers, then attention to text and image prompts."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts = ImagePrompts()
        self.attn1 = Attention(query_dim=32, heads=2, dim_head=16)
        self.attn2 = Attention(query_dim=32, cross_attention_dim=24, heads=2, dim_head=16)
        projections = (nn.ModuleList([nn.Linear(24, 32, bias=False)]) for _ in range(2))
        self.attn2.processor = ImagePromptProcessor(self.prompts, 0, 0, *projections)

    def run(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        masks = {0: tensors["mask"]}
        given = {name: tensors[name] for name in ("tokens", "bias", "scale")}
        self.prompts.adapters = [AdapterPrompts.of(**given, masks=masks)]
        states = self.attn1(tensors["states"])
        return (self.attn2(states, encoder_hidden_states=tensors["text"]),)


def block() -> Graph:
    torch.manual_seed(0)
    module = Block().eval()
    axes = {"batch": 3, "q": 24, "text": 7, "groups": 2, "tokens": 5, "scale": 1.0}
    return Graph(
        name="block",
        module=module,
        run=module.run,
        inputs=(
            Input(name="states", shape=("batch", "q", 32)),
            Input(name="text", shape=("batch", "text", 24)),
            Input(name="tokens", shape=("batch", "groups", "tokens", 24)),
            Input(name="bias", shape=("batch", "groups", "tokens"), values="bias"),
            Input(name="scale", shape=("batch", "groups", 1), values="scale"),
            Input(name="mask", shape=("batch", "groups", "q"), values="unit"),
        ),
        outputs={"attended": ("batch", "q", 32)},
        checks=({**axes, "batch": 1, "groups": 1, "q": 9}, axes),
    )


def answer(file: Path, inputs: dict[str, Tensor]) -> np.ndarray:
    return (
        get_backend("onnxruntime").load(file).run({name: value.numpy() for name, value in inputs.items()})["attended"]
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3)])
def test_results_stay_the_same(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    graph = block()
    file = tmp_path / "block.onnx"
    export_onnx(graph, file, dtype)
    before = [answer(file, graph.example(axes)) for axes in graph.checks]
    compile_onnx = export_backend("onnxruntime").onnx_compiler(EngineSection(), None)
    assert compile_onnx(graph, file, rig.sd15(rows=4), print) == file
    assert fuse_attention(file) == 0  # none are left
    model = onnx.load(file)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("MultiHeadAttention") == 3
    assert not {"Softmax", "Transpose"} & set(kinds)
    for axes, expected in zip(graph.checks, before, strict=True):
        inputs = graph.example(axes)
        np.testing.assert_allclose(answer(file, inputs), expected, atol=tolerance)
        unpadded = answer(file, inputs | {"bias": torch.zeros_like(inputs["bias"])})
        assert np.abs(unpadded - expected).max() > 20 * tolerance  # the test would notice ignored padding


def test_other_softmaxes_are_left_alone(tmp_path: Path) -> None:
    """The operator cannot apply a weight between softmax and product."""

    class Weighted(nn.Module):
        def run(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
            heads = tensors["x"].unflatten(-1, (2, -1)).transpose(1, 2)
            weights = (heads @ heads.transpose(2, 3)).softmax(-1) * 0.5
            return ((weights @ heads).transpose(1, 2).flatten(2),)

    module = Weighted()
    graph = Graph(
        name="weighted",
        module=module,
        run=module.run,
        inputs=(Input(name="x", shape=("batch", "q", 32)),),
        outputs={"attended": ("batch", "q", 32)},
        checks=({"batch": 2, "q": 5},),
    )
    file = tmp_path / "weighted.onnx"
    export_onnx(graph, file)
    content = file.read_bytes()
    assert fuse_attention(file) == 0
    assert file.read_bytes() == content
    assert DOMAIN.encode() not in content
