"""Graphs in half precision: what is cast, what is not, and that the casts are undone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from onnx import TensorProto
from transformers import CLIPVisionModelWithProjection

from imprompt_export import control, graphs, parity
from imprompt_export.backends import export_backend, openvino
from imprompt_export.bundle import BundleFile
from imprompt_export.checkpoints import load
from imprompt_export.exporter import _vae_precisions, bundle_graphs
from imprompt_export.onnx_graph import export_onnx
from imprompt_export.parity import compare, references
from imprompt_export.precision import Positional, cast, dtype_of
from imprompt_export.sections import EngineSection
from imprompt_serving.backends import get_backend
from imprompt_serving.backends import openvino as served_openvino
from imprompt_serving.denoiser.precision import DTYPES
from imprompt_serving.gpu.onnxruntime import OnnxRuntimeDeviceEngine
from tiny import base
from tiny.control import make_controlnet
from tiny.weights import randomize


@pytest.fixture(scope="module")
def graph() -> graphs.Graph:
    model = randomize(CLIPVisionModelWithProjection(base.vision_config("vit_h")), 1).eval()
    return graphs.image_encoder("plain", model)


def test_fp16_graph(graph: graphs.Graph, tmp_path: Path) -> None:
    """Weights and arithmetic are in fp16, inputs and outputs in float32, and the module is unchanged afterwards."""
    before = {name: tensor.clone() for name, tensor in graph.module.state_dict().items()}
    file = tmp_path / "graph.onnx"
    export_onnx(graph, file, torch.float16)
    model = onnx.load(file).graph
    weights = {w.data_type for w in model.initializer if len(w.dims) > 1}
    assert weights == {TensorProto.FLOAT16}
    assert {v.type.tensor_type.elem_type for v in (*model.input, *model.output)} == {TensorProto.FLOAT}
    for row in compare(graph, references(graph), file, "onnxruntime", "fp16"):
        assert 0 < row.difference <= row.allowed
        assert row.difference > graph.tolerance / 10  # a float32 graph would be closer
    after = graph.module.state_dict()
    assert all(
        tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]) for name, tensor in after.items()
    )


def test_wrong_weight_is_noticed_in_fp16(graph: graphs.Graph, tmp_path: Path) -> None:
    export_onnx(graph, tmp_path / "graph.onnx", torch.float16)
    weight = next(p for p in graph.module.parameters() if p.dim() > 1)
    weight.data.mul_(1.3)
    try:
        rows = compare(graph, references(graph), tmp_path / "graph.onnx", "onnxruntime", "fp16")
    finally:
        weight.data.div_(1.3)
    assert not any(row.passed for row in rows)


def test_exact_inputs_are_not_cast() -> None:
    """A timestep of 951.3 would be 951.5 in fp16 and 952 in bf16."""
    seen = {}

    def run(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        seen.update(tensors)
        return (tensors["sample"],)

    inputs = (
        graphs.Input(name="sample", shape=(1,)),
        graphs.Input(name="timestep", shape=(1,), values="timestep", exact=True),
        graphs.Input(name="input_ids", shape=(1,), values="index", below=5),
    )
    graph = graphs.Graph(
        name="any", module=torch.nn.Identity(), run=run, inputs=inputs, outputs={"sample": (1,)}, checks=({},)
    )
    (answer,) = Positional(graph, torch.bfloat16)(*graph.example({}).values())
    assert [seen[tensor.name].dtype for tensor in inputs] == [torch.bfloat16, torch.float32, torch.int64]
    assert answer.dtype == torch.float32


@pytest.fixture(scope="module")
def control_chain(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, graphs.Graph]:
    """A ControlNet and a UNet that takes its residuals, with their ONNX files in fp16."""
    folder = tmp_path_factory.mktemp("control")
    make_controlnet(folder / "net", layers_per_block=1, levels=2)
    net = ControlNetModel.from_pretrained(folder / "net").eval()
    unet = randomize(UNet2DConditionModel(**base.unet_config("sd15", 1, levels=2)), 2).eval()
    chain = control.controlnet("depth", net)[-1], graphs.unet(unet, [], control.residuals(unet))
    files = {folder / f"{graph.name}.onnx": graph for graph in chain}
    for file, graph in files.items():
        export_onnx(graph, file, torch.float16)
    return files


def test_residuals_go_from_engine_to_engine_in_fp16(control_chain: dict[Path, graphs.Graph]) -> None:
    """They take half the bytes, and the prediction equals that of a chain which casts them to float32 and back."""
    net, unet = control_chain.values()
    given = {name: tensor for graph in (net, unet) for name, tensor in graph.example(unet.checks[-1]).items()}
    half = {name: tensor.numpy() for name, tensor in given.items()}
    for file in control_chain:
        half |= get_backend("onnxruntime").load(file).run(half)
    for graph in (net, unet):
        through_float32 = replace(graph, internal=frozenset())
        with torch.no_grad(), cast(graph.module, torch.float16):
            answer = Positional(through_float32, torch.float16)(*(given[tensor.name] for tensor in graph.inputs))
        given |= zip(graph.outputs, answer, strict=True)
    assert sum(half[name].nbytes for name in net.outputs) == sum(given[name].nbytes for name in net.outputs) / 2
    expected = given["noise_pred"].numpy()
    assert half["noise_pred"].dtype == expected.dtype == np.float32
    assert np.abs(half["noise_pred"] - expected).max() < 5e-3 * np.abs(expected).max()
    silent = {name: np.zeros_like(half[name]) for name in net.outputs}
    other = get_backend("onnxruntime").load([*control_chain][1]).run(half | silent)["noise_pred"]
    assert np.abs(half["noise_pred"] - other).max() > 0.1 * np.abs(expected).max()


def test_engines_with_residuals_are_compared(control_chain: dict[Path, graphs.Graph]) -> None:
    """Example values are float32; engines cast inputs that they expect in another type."""
    for file, graph in control_chain.items():
        assert all(row.passed for row in compare(graph, references(graph), file, "onnxruntime", "fp16"))
        answer = OnnxRuntimeDeviceEngine(file, "cpu").run_tensors(graph.example(graph.checks[0]))
        types = {name: torch.float16 if name in graph.internal else torch.float32 for name in graph.outputs}
        assert {name: tensor.dtype for name, tensor in answer.items()} == types


def test_unet_of_sdxl_in_half_precision(tmp_path: Path) -> None:
    """It joins pooled text embeddings in fp16 with the embedding of sizes in float32."""
    two_levels = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "attention_head_dim": (2, 4)}
    two_levels |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (32, 64)}
    config = base.unet_config("sdxl", 1) | {"transformer_layers_per_block": 1} | two_levels
    unet = graphs.unet(randomize(UNet2DConditionModel(**config), 2).eval(), [])
    export_onnx(unet, tmp_path / "unet.onnx", torch.float16)
    assert all(row.passed for row in compare(unet, references(unet), tmp_path / "unet.onnx", "onnxruntime", "fp16"))


def test_vae_computes_in_bf16_on_cpus() -> None:
    engine = EngineSection(backend="openvino", precision="bf16")
    assert _vae_precisions(engine, None).get("bf16", "bf16") == "bf16"


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("known", [True, False])
def test_vae_computes_in_fp16_if_its_values_fit(tmp_path: Path, precision: str, known: bool) -> None:
    base.make_sdxl(tmp_path / "base", layers_per_block=1)
    engine = f'[engine]\nbackend = "tensorrt"\nprecision = "{precision}"\n'
    (tmp_path / "bundle.toml").write_text(f'name = "tiny"\nbase = "base"\n{engine}')
    bundle = BundleFile.load(tmp_path / "bundle.toml")
    checkpoints = load(bundle)
    if not known:
        checkpoints.pipeline.vae.decoder.conv_norm_out = torch.nn.BatchNorm2d(16)
    types = {graph.name: dtype_of(graph, precision) for graph in bundle_graphs(bundle, checkpoints)}
    assert types["vae_decoder"] == types["vae_encoder"] == (torch.float16 if known else torch.float32)
    assert types["unet"] == types["text_encoder_2"] == {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def test_openvino_computes_in_bf16_but_takes_the_timestep_in_float32(tmp_path: Path) -> None:
    """In bf16 a timestep of 999 would be 1000. Residuals enter and leave in float32, because numpy has no bf16."""
    pytest.importorskip("openvino", reason="OpenVINO is not installed: imprompt[openvino]")
    make_controlnet(tmp_path / "net", layers_per_block=1, levels=2)
    net = ControlNetModel.from_pretrained(tmp_path / "net").eval()
    unet = randomize(UNet2DConditionModel(**base.unet_config("sd15", 1, levels=2)), 2).eval()
    chain = control.controlnet("depth", net)[-1], graphs.unet(unet, [], control.residuals(unet))
    given = {name: tensor for graph in chain for name, tensor in graph.example(chain[-1].checks[-1]).items()}
    given["timestep"].fill_(999)
    tensors = {name: tensor.numpy() for name, tensor in given.items()}
    for graph in chain:
        file = tmp_path / graph.name / f"{graph.name}.onnx"
        export_onnx(graph, file, torch.bfloat16)
        tensors |= get_backend("openvino").load(openvino.convert(file)).run(tensors)
        with torch.no_grad():
            given |= zip(graph.outputs, graph.run(given), strict=True)
        assert {tensors[name].dtype for name in graph.outputs} == {np.dtype(np.float32)}
    exact, given["timestep"] = given["noise_pred"], torch.full_like(given["timestep"], 1000)
    with torch.no_grad():
        (next_step,) = chain[-1].run(given)
    error = float((torch.from_numpy(tensors["noise_pred"]) - exact).square().mean())
    assert 0 < error < 0.2 * float((next_step - exact).square().mean())


def test_openvino_computes_in_float32_on_cpus_without_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There it would emulate bf16, which takes several times as long."""
    pytest.importorskip("openvino", reason="OpenVINO is not installed: imprompt[openvino]")
    unet = randomize(UNet2DConditionModel(**base.unet_config("sd15", 1, levels=1)), 2).eval()
    made, file = graphs.unet(unet, []), tmp_path / "unet.onnx"
    export_onnx(made, file, torch.bfloat16)
    file, example = openvino.convert(file), made.example(made.checks[-1])
    monkeypatch.setattr(served_openvino, "has_bf16", lambda: False)
    answer = get_backend("openvino").load(file).run({name: tensor.numpy() for name, tensor in example.items()})
    for weight in unet.parameters():
        weight.data = weight.data.bfloat16().float()
    with torch.no_grad():
        (expected,) = made.run(example)
    assert np.abs(answer["noise_pred"] - expected.numpy()).max() < 1e-3 * float(expected.abs().max())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("avx512f avx512_vnni", False), ("avx512_vnni avx512_bf16", True), ("amx_tile amx_bf16 amx_int8", True)],
)
def test_bf16_arithmetic_is_read_from_the_flags_of_the_cpu(tmp_path: Path, flags: str, expected: bool) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu {flags} rdpid\nbugs\t\t: none\n")
    assert served_openvino.has_bf16(tmp_path / "cpuinfo") is expected


def comparison_backend(backend: str, precision: str, targets: tuple[str, ...] = ()) -> str | None:
    return export_backend(backend).comparison_backend(
        EngineSection(backend=backend, precision=precision, targets=targets)
    )


def test_backend_that_runs_the_comparison() -> None:
    """Without a GPU, the ONNX file of an engine is compared on the CPU, which does not support bf16."""
    if torch.cuda.is_available() or "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("there is a GPU")
    assert comparison_backend("onnxruntime", "fp16") == comparison_backend("tensorrt_rtx", "fp16") == "onnxruntime"
    assert comparison_backend("tensorrt", "bf16") is comparison_backend("onnxruntime", "bf16") is None
    assert comparison_backend("openvino", "fp32") == "openvino"


@pytest.mark.parametrize(("targets", "expected"), [(("SM89", "SM90"), "tensorrt_rtx"), (("SM89",), "onnxruntime")])
def test_engines_for_other_gpus_are_compared_by_their_onnx_file(
    monkeypatch: pytest.MonkeyPatch, targets: tuple[str, ...], expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert comparison_backend("tensorrt_rtx", "fp16", targets) == expected
    assert comparison_backend("tensorrt", "fp16", targets) == "tensorrt"


def test_comparison_at_other_sizes(graph: graphs.Graph, tmp_path: Path) -> None:
    export_onnx(graph, tmp_path / "graph.onnx")
    rows = compare(graph, references(graph, ({"batch": 2}, {"batch": 5})), tmp_path / "graph.onnx", "onnxruntime")
    assert [row.sizes for row in rows] == [{"batch": 2}, {"batch": 5}]
    assert all(row.passed for row in rows)


@pytest.mark.parametrize(
    ("backend", "precision"), [("onnxruntime", "fp32"), ("onnxruntime", "fp16"), ("openvino", "fp32")]
)
def test_vae_engines_flag_pictures_that_are_not_finite(tmp_path: Path, backend: str, precision: str) -> None:
    """Flags are per picture: others in the batch are fine."""
    if backend == "openvino":
        pytest.importorskip("openvino", reason="OpenVINO is not installed: imprompt[openvino]")
    decoder = graphs.vae_decoder(base._vae(1, scaling_factor=0.18215))
    file = tmp_path / "vae_decoder.onnx"
    export_onnx(decoder, file, DTYPES[precision])
    output = {value.name: value.type.tensor_type.elem_type for value in onnx.load(file).graph.output}
    assert output == {"images": TensorProto.UINT8, "finite": TensorProto.BOOL}
    if backend == "openvino":
        file = openvino.convert(file)
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latents[1, 0, 3, 3], latents[2] = torch.nan, torch.inf
    answer = get_backend(backend).load(file).run({"latents": latents.numpy()})
    assert answer["finite"].astype(bool).tolist() == [[True], [False], [False], [True]]
    alone = get_backend(backend).load(file).run({"latents": latents[3:].numpy()})
    assert np.abs(answer["images"][3].astype(int) - alone["images"][0].astype(int)).max() <= 1


class Broken:
    """An engine whose outputs are always `values`."""

    def __init__(self, **values: torch.Tensor) -> None:
        self._values = {name: value.numpy() for name, value in values.items()}

    def run(self, tensors: object) -> dict[str, np.ndarray]:
        return self._values


@pytest.mark.parametrize(
    ("values", "passed"),
    [
        ({"images": torch.ones(2), "finite": torch.tensor([True, True])}, True),
        ({"images": torch.tensor([1.0, torch.nan]), "finite": torch.tensor([True, True])}, False),
        ({"images": torch.tensor([1.0, torch.inf]), "finite": torch.tensor([True, True])}, False),
        ({"images": torch.ones(2), "finite": torch.tensor([True, False])}, False),
    ],
)
def test_comparison_notices_nan_infinity_and_wrong_booleans(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, torch.Tensor], passed: bool
) -> None:
    """Booleans must be equal, even where levels of pictures may differ by one."""
    expected = (torch.ones(2), torch.tensor([True, True]))
    graph = graphs.Graph(
        name="any",
        module=torch.nn.Identity(),
        run=lambda _: expected,
        inputs=(),
        outputs={"images": (2,), "finite": (2,)},
        checks=({},),
        tolerance=1.0,
    )
    monkeypatch.setattr(parity, "get_backend", lambda name: SimpleNamespace(load=lambda path: Broken(**values)))
    assert [row.passed for row in compare(graph, references(graph), Path("any"), "onnxruntime")] == [passed]
