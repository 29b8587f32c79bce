"""AOTInductor packages: what is built, what is reused, and what is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest import mock

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from export.test_profiles import bundle
from imprompt_export import BundleError, graphs
from imprompt_export.backends import BuiltEngine, export_backend
from imprompt_export.backends.inductor import Packager, started_workers
from imprompt_export.lora import Factors
from imprompt_export.parity import compare, references
from imprompt_export.precision import cast
from imprompt_export.profiles import exact_axes
from imprompt_export.programs import trace
from imprompt_export.sections import EngineSection
from imprompt_serving.backends import EngineError, get_backend
from imprompt_serving.backends.inductor import WEIGHTS, EngineInfo, InductorEngine
from imprompt_serving.gpu import LoraEngine
from imprompt_serving.gpu.loras import LoraWeights
from imprompt_serving.launcher.server import MMAP_THRESHOLD_BYTES
from imprompt_serving.specs import Bundle, Range, Shapes

SHAPES = Shapes(height=Range(64, 64, 96), width=Range(64, 64, 128), rows=Range(1, 2, 2))


def small(name: str = "unet", width: int = 4) -> graphs.Graph:
    """Build a very small graph with dynamic axes for rows, picture, and text."""
    torch.manual_seed(width)
    module = torch.nn.Conv2d(4, width, 3, padding=1).requires_grad_(False)
    size: tuple[int | str, ...] = ("batch", 4, "h", "w")

    def run(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return (module(tensors["sample"]) + tensors["encoder_hidden_states"].mean(1)[..., None, None],)

    return graphs.Graph(
        name=name,
        module=module,
        run=run,
        inputs=(
            graphs.Input(name="sample", shape=size),
            graphs.Input(name="encoder_hidden_states", shape=("batch", "text", width)),
        ),
        outputs={"noise_pred": size},
        checks=({"batch": 2, "h": 8, "w": 8, "text": 77}, {"batch": 3, "h": 9, "w": 12, "text": 7}),
    )


def of_shapes() -> Bundle:
    return bundle(SHAPES)


class Workshop:
    """Builds engines with a cache of its own. All use the same workers, which take seconds to start."""

    def __init__(self, folder: Path, workers: ProcessPoolExecutor) -> None:
        self.folder, self.count, self.workers = folder, 0, workers

    def make(self, graph: graphs.Graph, precision: str = "fp32", *, exact: bool = False) -> BuiltEngine:
        self.count += 1
        packager = Packager(precision, self.workers, exact=exact, cache=self.folder / "cache")
        return packager.start(graph, self.folder / str(self.count) / graph.name, of_shapes())()


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    with started_workers() as workers:
        yield Workshop(tmp_path_factory.mktemp("inductor"), workers)


@pytest.fixture(scope="module")
def built(workshop: Workshop) -> BuiltEngine:
    return workshop.make(small())


def test_one_package_serves_all_sizes(built: BuiltEngine) -> None:
    assert (built.packages_built, built.packages_reused) == (1, 0)
    checks = export_backend("inductor").check_axes(small(), of_shapes())
    rows = compare(
        small(), references(small(), (*checks, {"batch": 5, "h": 13, "w": 10, "text": 1})), built.file, "inductor"
    )
    assert [row.sizes["batch"] for row in rows] == [2, 3, 1, 5]
    assert all(row.passed for row in rows)


FAULTS = """
import resource, sys
from pathlib import Path
import numpy as np
from imprompt_serving.backends import get_backend

engine = get_backend("inductor").load(Path(sys.argv[1]))
tensors = {
    "sample": np.ones((1, 4, 512, 512), np.float32),
    "encoder_hidden_states": np.ones((1, 7, 4), np.float32),
}
for count in (2, 10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        engine.run(tensors)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_calls_reuse_the_memory_of_earlier_calls(built: BuiltEngine) -> None:
    """Each of ten calls makes at least two results of 1,024 pages, which a server's processes otherwise clear anew."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD_BYTES)}
    command = [sys.executable, "-c", FAULTS, str(built.file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) < 5 * 1024


def test_other_weights_reuse_the_package(workshop: Workshop, built: BuiltEngine) -> None:
    graph = small()
    graph.module.state_dict()["weight"].mul_(-3)
    again = workshop.make(graph)
    assert (again.packages_built, again.packages_reused) == (0, 1)
    package, old = (file.with_name("unet.1.pt2").read_bytes() for file in (again.file, built.file))
    assert package == old
    assert all(row.passed for row in compare(graph, references(graph), again.file, "inductor"))
    assert not any(row.passed for row in compare(graph, references(graph), built.file, "inductor"))


def test_cache_key_covers_everything_a_package_depends_on(workshop: Workshop) -> None:
    packager = Packager("fp32", workshop.workers, cache=workshop.folder / "cache")

    def key(graph: graphs.Graph, dtype: torch.dtype = torch.float32, **exact: int) -> str:
        with cast(graph.module, dtype):
            return packager._key(trace(graph, dtype, axes=graph.checks[-1] | exact, exact=exact))

    keys = [
        key(small()),
        key(small(width=5)),
        key(small(), torch.float16),
        key(small(), h=8, w=8),
        key(small(), h=9, w=8),
    ]
    packager._target = "cpu ANOTHER"
    keys.append(key(small()))
    assert len(set(keys)) == len(keys)


def test_packages_for_exact_sizes(workshop: Workshop) -> None:
    """As on a GPU, there is one package per picture size; the error for other sizes lists the existing ones."""
    graph = small("vae_decoder")
    axes = exact_axes(graph, of_shapes())
    assert axes == [{"h": 8, "w": 8}, {"h": 12, "w": 16}]
    built = workshop.make(graph, exact=True)
    assert built.packages_built == 2
    rows = compare(graph, references(graph, [graph.checks[-1] | sizes for sizes in axes]), built.file, "inductor")
    assert all(row.passed for row in rows)
    engine = get_backend("inductor").load(built.file)
    example = graph.example(graph.checks[-1])
    with pytest.raises(EngineError, match=r"takes h=8 w=8; h=12 w=16, not h=9 w=12; see \[shapes\]"):
        engine.run({name: tensor.numpy() for name, tensor in example.items()})


def test_exact_sizes_of_step_networks_include_the_rows() -> None:
    axes = exact_axes(small(), of_shapes())
    assert axes == [
        {"h": h, "w": w, "batch": rows} for h, w in ((8, 8), (12, 16)) for rows in (1, 2)
    ]  # the buckets of 4 and more rows are above `shapes.rows`


def test_packages_in_half_precision(workshop: Workshop) -> None:
    """Weights are in bf16, inputs and outputs in float32."""
    graph = small()
    built = workshop.make(graph, "bf16")
    rows = compare(graph, references(graph), built.file, "inductor", "bf16")
    assert all(row.passed for row in rows)
    assert min(row.difference for row in rows) > graph.tolerance / 10  # a float32 graph would be closer
    assert {weight.dtype for weight in graph.module.parameters()} == {torch.float32}


def test_internal_tensors_keep_the_type_of_the_packages(workshop: Workshop) -> None:
    """Numpy has no bf16: such arrays are float32, and the engine casts them."""
    graph = replace(small(), internal=frozenset(("sample", "noise_pred")))
    made = workshop.make(graph, "bf16")
    engine = get_backend("inductor").load(made.file)
    assert isinstance(engine, InductorEngine)
    example = graph.example(graph.checks[0])
    answer = engine.run_tensors(example)["noise_pred"]
    assert answer.dtype == torch.bfloat16
    assert torch.equal(engine.run_tensors(example | {"sample": example["sample"].bfloat16()})["noise_pred"], answer)
    array = engine.run({name: tensor.numpy() for name, tensor in example.items()})["noise_pred"]
    assert np.array_equal(array, answer.float().numpy())
    assert all(row.passed for row in compare(graph, references(graph), made.file, "inductor", "bf16"))


def with_loras() -> graphs.Graph:
    """Make `small` with two LoRAs for its convolution, of rank 2 and 1."""
    torch.manual_seed(9)
    graph = small()
    weight = graph.module.state_dict()["weight"]
    layers = [{"0": Factors(torch.randn(rank, *weight.shape[1:]), torch.randn(len(weight), rank))} for rank in (2, 1)]
    return replace(graph, module=torch.nn.Sequential(graph.module), loras=dict(zip("ab", layers, strict=True)))


@pytest.mark.parametrize("channels_last", [False, True])
def test_loras_replace_weights_in_place_and_exactly(channels_last: bool, workshop: Workshop) -> None:
    graph, pointers = with_loras(), set[int]()
    file = workshop.make(graph).file
    order = torch.channels_last if channels_last else torch.contiguous_format
    weights = {
        name: w.clone(memory_format=order) if w.ndim == 4 else w
        for name, w in load_file(file.with_suffix(WEIGHTS)).items()
    }
    loras, name = LoraWeights(file, weights, lambda name: weights[name].clone()), "module.0.weight"
    base, seen = weights[name].clone(), dict[str, torch.Tensor]()
    for scales in ({"a": 0.7}, {"a": 0.7, "b": -2.0}, {}, {"b": 1.0}, {"a": 0.7, "b": -2.0}, {"a": 0.7}, {}):
        loras.use(scales)
        factors = [(graph.loras[lora]["0"], scale) for lora, scale in scales.items()]
        expected = base + sum(scale * (up @ down.flatten(1)).reshape(base.shape) for (down, up), scale in factors)
        torch.testing.assert_close(weights[name], expected)
        assert torch.equal(weights[name], seen.setdefault(str(scales), weights[name].clone()))
        pointers.add(weights[name].data_ptr())
    assert len(pointers) == 1
    assert torch.equal(weights[name], base)


def test_a_failed_switch_is_repeated(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    file = workshop.make(with_loras()).file
    weights = load_file(file.with_suffix(WEIGHTS))
    base = weights["module.0.weight"].clone()
    loras = LoraWeights(file, weights, lambda name: base)
    loras.use({"a": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr(torch, "addmm", mock.Mock(side_effect=RuntimeError("out of memory")))
        with pytest.raises(RuntimeError):
            loras.use({"b": 1.0})
    loras.use({})
    assert torch.equal(weights["module.0.weight"], base)


def test_a_package_runs_with_the_loras_in_use(workshop: Workshop) -> None:
    graph = with_loras()
    file = workshop.make(graph).file
    engine, example = get_backend("inductor").load(file), graph.example(graph.checks[-1])
    assert isinstance(engine, LoraEngine)
    tensors = {name: tensor.numpy() for name, tensor in example.items()}
    plain = engine.run(tensors)["noise_pred"]
    engine.use_loras({"b": 0.5})
    changed = engine.run(tensors)["noise_pred"]
    with torch.no_grad():
        down, up = graph.loras["b"]["0"]
        weight = graph.module.state_dict()["0.weight"]
        weight += 0.5 * (up @ down.flatten(1)).reshape(weight.shape)
        np.testing.assert_allclose(changed, graph.run(example)[0].numpy(), atol=1e-4)
    assert not np.allclose(changed, plain, atol=1e-2)
    engine.use_loras({})
    assert np.array_equal(engine.run(tensors)["noise_pred"], plain)
    # Weights only change in memory: another engine reads the original file.
    engine.use_loras({"b": 0.5})
    assert np.array_equal(get_backend("inductor").load(file).run(tensors)["noise_pred"], plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "2.0.0"}, r"unet was built with torch 2\.0\.0, but .* is installed: export the bundle again"),
        ({"target": "cpu NONE"}, r"unet was built for cpu NONE, but this machine is cpu .*: export the bundle on it"),
        ({"target": "cuda SM00"}, r"unet was built for (an NVIDIA GPU \(cuda SM00\)|cuda SM00)"),
    ],
)
def test_engines_of_another_machine_are_refused(
    built: BuiltEngine, tmp_path: Path, change: dict[str, str], message: str
) -> None:
    for file in built.file.parent.iterdir():
        shutil.copyfile(file, tmp_path / file.name)
    info = msgspec.json.decode(built.file.read_bytes(), type=EngineInfo)
    msgspec.structs.replace(info, **change).save(tmp_path / "unet.json")
    with pytest.raises(EngineError, match=message):
        get_backend("inductor").load(tmp_path / "unet")


def test_threads_are_set(built: BuiltEngine) -> None:
    """The engine runs on torch's threads, even if the process had fewer before."""
    assert torch.get_num_threads() == 1
    get_backend("inductor").load(built.file, threads=3)
    assert torch.get_num_threads() == 3


def test_outputs_are_not_overwritten_by_the_next_call(built: BuiltEngine) -> None:
    engine = get_backend("inductor").load(built.file)
    first, second = ({n: t.numpy() for n, t in small().example(small().checks[0], seed).items()} for seed in (1, 2))
    answer = engine.run(first)["noise_pred"]
    kept = answer.copy()
    assert not np.array_equal(engine.run(second)["noise_pred"], kept)
    assert np.array_equal(answer, kept)


def test_missing_compiler_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BundleError, match=r"no-such-compiler is not installed: install g\+\+"):
        export_backend("inductor").check_installed(EngineSection(backend="inductor"))
