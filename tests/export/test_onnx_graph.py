"""What the translation to ONNX does itself, rather than leave it to the decomposition of PyTorch, which is slow."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from imprompt_export import graphs, onnx_graph, t2i
from imprompt_export.families import export_family
from imprompt_export.graphs import Graph, Input
from imprompt_export.parity import check_parity, compare, references
from tiny import base


@pytest.fixture
def decompositions(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Programs that were decomposed."""
    decomposed: list[object] = []
    decompose = onnx_graph._decompose

    def record(program: torch.export.ExportedProgram, registry: object) -> torch.export.ExportedProgram:
        decomposed.append(program)
        return decompose(program, registry)

    monkeypatch.setattr(onnx_graph, "_decompose", record)
    return decomposed


def export_and_compare(graph: Graph, folder: Path) -> None:
    expected = references(graph)
    onnx_graph.export_onnx(graph, folder / "graph.onnx")
    check_parity(compare(graph, expected, folder / "graph.onnx", "onnxruntime"))


def test_text_encoder_is_not_decomposed(decompositions: list[object], tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(base.make_sd15(tmp_path / "base", levels=2))
    graph = graphs.text_encoder("text_encoder", pipeline.text_encoder, 77, penultimate=False)
    export_and_compare(graph, tmp_path)
    assert not decompositions


def test_vae_is_not_decomposed(decompositions: list[object], tmp_path: Path) -> None:
    vae = AutoencoderKL.from_pretrained(base.make_sd15(tmp_path / "base", levels=2) / "vae")
    for graph in (graphs.vae_encoder(vae, 8), graphs.vae_decoder(vae)):
        export_and_compare(graph, tmp_path)
    assert not decompositions


def test_unet_that_adds_features_in_place_is_not_decomposed(decompositions: list[object], tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(base.make_sd15(tmp_path / "base", levels=2) / "unet")
    graph = graphs.unet(unet, [], (), t2i.features(unet, export_family("sd15")))
    export_and_compare(graph, tmp_path)
    assert not decompositions


class Adding(nn.Module):
    """Adds one input to a tensor of `dtype` in place, after `before` has seen the tensor."""

    def __init__(self, before: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.before, self.dtype = before, dtype

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        changed = (x * 2).to(self.dtype) * 3
        seen = self.before(changed)
        changed += y
        return seen.float() + changed.float().sum()


@pytest.mark.parametrize(
    ("before", "dtype", "decomposed"),
    [
        (lambda tensor: tensor, torch.float32, False),
        (lambda tensor: tensor * 3, torch.float32, False),
        (lambda tensor: tensor[:, :2], torch.float32, True),
        (lambda tensor: tensor.view(-1, 4), torch.float32, True),
        (lambda tensor: tensor, torch.float16, True),
    ],
    ids=["the same tensor", "a value", "a slice", "a view", "a wider type"],
)
def test_addition_in_place_changes_what_it_should(
    before: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    decomposed: bool,
    decompositions: list[object],
    tmp_path: Path,
) -> None:
    module = Adding(before, dtype)
    graph = Graph(
        name="adding",
        module=module,
        run=lambda tensors: (module(tensors["x"], tensors["y"]),),
        inputs=(Input(name="x", shape=("batch", 4)), Input(name="y", shape=("batch", 4))),
        outputs={"sum": ("batch", "columns")},
        checks=({"batch": 2}, {"batch": 3}),
        tolerance=1e-4 if dtype == torch.float32 else 1e-2,
    )
    export_and_compare(graph, tmp_path)
    assert bool(decompositions) == decomposed


@pytest.mark.parametrize("concatenate", [torch.cat, torch.concat, torch.concatenate])
def test_tensors_of_two_types_are_concatenated_as_in_pytorch(
    concatenate: Callable[[list[Tensor], int], Tensor], decompositions: list[object], tmp_path: Path
) -> None:
    graph = Graph(
        name="concatenation",
        module=nn.Identity(),
        run=lambda tensors: (concatenate([tensors["x"].half(), tensors["y"]], 1),),
        inputs=(Input(name="x", shape=("batch", 4)), Input(name="y", shape=("batch", 2))),
        outputs={"both": ("batch", 6)},
        checks=({"batch": 2}, {"batch": 3}),
        tolerance=1e-2,
    )
    export_and_compare(graph, tmp_path)
    assert not decompositions


def test_the_weights_of_an_exported_graph_are_not_kept(tmp_path: Path) -> None:
    """onnxscript keeps the last graph, and a part of a safetensors file keeps all of it in memory."""
    module, file = nn.Linear(4, 4, bias=False), tmp_path / "weights.safetensors"
    save_file({"weight": torch.ones(4, 4)}, file)
    module.weight = nn.Parameter(load_file(file)["weight"], requires_grad=False)
    size: tuple[int | str, ...] = ("batch", 3, 4)
    graph = Graph(
        name="linear",
        module=module,
        run=lambda tensors: (module(tensors["x"]) - 1,),
        inputs=(Input(name="x", shape=size),),
        outputs={"y": size},
        checks=({"batch": 2}, {"batch": 3}),
    )
    export_and_compare(graph, tmp_path)
    assert str(file) in Path("/proc/self/maps").read_text()
    module.weight.data = torch.empty(0)
    gc.collect()
    assert str(file) not in Path("/proc/self/maps").read_text()
