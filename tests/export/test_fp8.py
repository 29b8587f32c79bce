"""fp8: which layers compute in it, their scales, and how close they are to fp32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn

from imprompt_export import BundleError, fp8, graphs
from imprompt_export.backends import export_backend, inductor
from imprompt_export.backends.inductor import Packager, started_workers
from imprompt_export.bundle import BundleFile
from imprompt_export.checkpoints import load
from imprompt_export.exporter import bundle_graphs, describe
from imprompt_export.fp8 import Fp8Linear, calibrate, fp8_layers, measure_quality, quantized
from imprompt_export.parity import compare, references
from imprompt_export.precision import Positional, cast, dtype_of
from imprompt_export.programs import trace
from imprompt_export.quality import QualityError, check_quality
from imprompt_export.sections import EngineSection
from tiny import base, control
from tiny.weights import randomize


@pytest.fixture(scope="module")
def unet() -> graphs.Graph:
    return graphs.unet(randomize(UNet2DConditionModel(**base.unet_config("sd15", 1, levels=2)), 2).eval(), [])


def predict(graph: graphs.Graph, tensors: dict[str, Tensor], ranges: dict[str, float]) -> Tensor:
    """Return the prediction of `graph` in fp16, with the layers in `ranges` in fp8."""
    with torch.no_grad(), cast(graph.module, torch.float16), quantized(graph.module, ranges):
        return Positional(graph, torch.float16)(*tensors.values())[0]


def ranges_of(graph: graphs.Graph, seeds: range = range(2)) -> dict[str, float]:
    found: dict[str, float] = {}
    with torch.no_grad(), fp8._watched(graph.module, found):
        for seed in seeds:
            graph.run(graph.example(graph.checks[0], seed))
    return found


def snr_db(exact: Tensor, other: Tensor) -> float:
    return float(10 * torch.log10(exact.square().sum() / (exact - other).square().sum()))


def test_layers_of_transformer_blocks_compute_in_fp8(unet: graphs.Graph) -> None:
    layers = fp8_layers(unet.module)
    block = "down_blocks.0.attentions.0.transformer_blocks.0."
    own = {name.removeprefix(block) for name in layers if name.startswith(block)}
    queries = {f"attn1.to_{part}" for part in ("q", "k", "v", "out.0")} | {"attn2.to_q", "attn2.to_out.0"}
    assert own == queries | {"ff.net.0.proj", "ff.net.2"}
    assert len(layers) == 8 * len({name.split(".transformer_blocks")[0] for name in layers})
    assert not [name for name in layers if "time" in name or "attn2.to_k" in name or "attn2.to_v" in name]


def test_layers_with_sizes_that_gpus_refuse_stay_in_half_precision() -> None:
    block = nn.ModuleDict({"ff": nn.ModuleDict({"net": nn.ModuleDict({"2": nn.Linear(24, 32), "0": nn.Identity()})})})
    module = nn.ModuleDict({"transformer_blocks": nn.ModuleDict({"0": block})})
    assert not fp8_layers(module)
    block["ff"]["net"]["2"] = nn.Linear(32, 48)  # type: ignore[index]
    assert [*fp8_layers(module)] == ["transformer_blocks.0.ff.net.2"]


def test_predictions_are_close_and_the_network_is_restored(unet: graphs.Graph) -> None:
    example = unet.example(unet.checks[1], 5)
    with torch.no_grad():
        exact = unet.run(example)[0]
    ranges = ranges_of(unet)
    assert ranges.keys() == fp8_layers(unet.module).keys()
    near, half = predict(unet, example, ranges), predict(unet, example, {})
    assert 15 < snr_db(exact, near) < 30 < 45 < snr_db(exact, half)  # fp8 is in use
    with torch.no_grad():
        assert torch.equal(unet.run(example)[0], exact)
    narrow = {name: value / 100 for name, value in ranges.items()}
    assert snr_db(exact, predict(unet, example, narrow)) < 10  # ranges matter: inputs saturate


def test_inputs_beyond_the_range_saturate() -> None:
    """A plain cast to e4m3 would make them NaN."""
    linear = nn.Linear(16, 16)
    layer = Fp8Linear(linear, largest_input=1.0)
    with torch.no_grad():
        answer, expected = layer(torch.full((2, 3, 16), 1e4)), linear(torch.full((2, 3, 16), fp8.MARGIN))
    assert answer.shape == (2, 3, 16)
    torch.testing.assert_close(answer, expected, rtol=0.1, atol=0.1)
    with torch.no_grad():
        linear.weight.zero_()
        assert torch.equal(Fp8Linear(linear, 0.0)(torch.zeros(4, 16)), linear.bias.expand(4, 16))


def test_packages_do_not_depend_on_scales(unet: graphs.Graph, tmp_path: Path) -> None:
    with started_workers() as workers:
        packager = Packager("fp8", workers, cache=tmp_path)

    def key(ranges: dict[str, float]) -> str:
        with cast(unet.module, torch.float16), quantized(unet.module, ranges):
            return packager._key(trace(unet, torch.float16))

    one, other = ranges_of(unet, range(1)), ranges_of(unet, range(1, 2))
    assert one != other
    assert key(one) == key(other) != key(dict([*one.items()][:-1]))


def block_graph() -> graphs.Graph:
    """Return a feed-forward block as a graph, whose package builds fast."""
    torch.manual_seed(0)
    ff = nn.ModuleDict(
        {"net": nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(32, 64)}), nn.GELU(), nn.Linear(64, 32)])}
    )
    module = nn.ModuleDict({"transformer_blocks": nn.ModuleList([nn.ModuleDict({"ff": ff})])}).requires_grad_(False)

    def run(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        net: Any = module.get_submodule("transformer_blocks.0.ff.net")
        states = tensors["states"]
        return (states + net[2](net[1](net[0]["proj"](states))),)

    return graphs.Graph(
        name="unet",
        module=module,
        run=run,
        inputs=(graphs.Input(name="states", shape=("batch", "q", 32)),),
        outputs={"noise_pred": ("batch", "q", 32)},
        checks=({"batch": 1, "q": 9}, {"batch": 3, "q": 24}),
        tolerance=1e-3,
        precisions=graphs.WITH_FP8,
    )


def test_packages_in_fp8(tmp_path: Path) -> None:
    """Weights are stored in fp8; results are close to those of PyTorch at any size."""
    graph = block_graph()
    graph = replace(graph, fp8_ranges=ranges_of(graph))
    with started_workers() as workers:
        made = Packager("fp8", workers, cache=tmp_path / "cache").start(graph, tmp_path / "unet", SimpleNamespace())()
    weights = load_file(made.file.with_suffix(".safetensors"))
    layers = "transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff.net.2"
    found = {name: weight.dtype for name, weight in weights.items() if name.endswith(("weight", "scale"))}
    assert found == {
        f"module.{layer}.{part}": torch.float8_e4m3fn if part == "weight" else torch.float32
        for layer in layers
        for part in ("weight", "weight_scale", "input_scale")
    }
    rows = compare(graph, references(graph, (*graph.checks, {"batch": 5, "q": 1})), made.file, "inductor", "fp8")
    assert all(row.passed for row in rows)
    assert min(row.difference for row in rows) > graph.tolerance  # the graph does not compute in fp16


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> BundleFile:
    folder = tmp_path_factory.mktemp("fp8")
    base.make_sd15(folder / "base", layers_per_block=1, levels=2)
    control.make_controlnet(folder / "depth", layers_per_block=1, levels=2)
    engine = '[engine]\nbackend = "inductor"\nprecision = "fp8"\n[[controlnet]]\nname = "depth"\npath = "depth"\n'
    shapes = "[shapes]\nheight = [64, 64, 64]\nwidth = [64, 64, 64]\n"
    (folder / "bundle.toml").write_text(f'name = "tiny"\nbase = "base"\n{engine}{shapes}')
    return BundleFile.load(folder / "bundle.toml")


class Quantized:
    """A graph in fp16 with layers in fp8, run by PyTorch instead of its package."""

    def __init__(self, graph: graphs.Graph) -> None:
        self._graph = graph

    def run(self, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        given = {tensor.name: torch.from_numpy(tensors[tensor.name]) for tensor in self._graph.inputs}
        given = {name: t.half() if name in self._graph.internal else t for name, t in given.items()}
        module, ranges = self._graph.module, self._graph.fp8_ranges
        with torch.inference_mode(), cast(module, torch.float16), quantized(module, ranges):
            answer = Positional(self._graph, torch.float16)(*given.values())
        return {name: value.numpy() for name, value in zip(self._graph.outputs, answer, strict=True)}


def test_step_networks_are_calibrated_and_checked(tiny: BundleFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "RUNS", [replace(run, steps=2) for run in fp8.RUNS[1:3]])
    monkeypatch.setattr(fp8, "HELD_OUT", replace(fp8.HELD_OUT, steps=2))
    checkpoints = load(tiny)
    bundle, all_graphs = describe(tiny, checkpoints), bundle_graphs(tiny, checkpoints)
    types = {graph.name: dtype_of(graph, "fp8") for graph in all_graphs}
    assert set(types.values()) == {torch.float16}
    made = {graph.name: graph for graph in calibrate(bundle, checkpoints, all_graphs)}
    networks = {"unet", "controlnet_depth"}
    assert {name for name, graph in made.items() if graph.fp8_ranges} == networks
    for name in networks:
        assert made[name].fp8_ranges.keys() == fp8_layers(made[name].module).keys()
        assert made[name].precision("fp8") == "fp8"
    engines = SimpleNamespace(load=lambda path: Quantized(made[path.name]))
    monkeypatch.setattr(fp8, "get_backend", lambda name: engines)
    rows = measure_quality(bundle, checkpoints, made, {name: Path(name) for name in networks}, min_snr_db=10.0)
    assert {row.engine for row in rows} == networks
    for row in rows:
        assert row.precision == "fp8"
        assert row.calls == 3  # PNDM makes one more than there are steps
        assert 10 < row.worst_snr_db <= row.snr_db < 50
        assert row.picture_distance > 0
    check_quality(rows)
    strict = [msgspec.structs.replace(row, min_snr_db=60.0) for row in rows]
    with pytest.raises(QualityError, match=r"unet in fp8: .* dB .* engine.min_snr_db is 60"):
        check_quality(strict)


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "_on_gpu", lambda: True)
    monkeypatch.setattr(inductor, "_compute_capability", lambda: (8, 6))
    backend = export_backend("inductor")
    with pytest.raises(BundleError, match=r"fp8.* needs a GPU of compute capability 8\.9 or newer; this one has 8\.6"):
        backend.check_installed(EngineSection(backend="inductor", precision="fp8"))
    backend.check_installed(EngineSection(backend="inductor", precision="fp16"))
