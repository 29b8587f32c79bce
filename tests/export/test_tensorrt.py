"""TensorRT's engines as far as they can be had without a GPU: TensorRT-RTX builds, and nothing can be run."""

from __future__ import annotations

import ctypes
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from diffusers.models.embeddings import ImageProjection
from google.protobuf import text_format
from onnx import TensorProto, helper
from rich.console import Console
from tritonclient.grpc import model_config_pb2 as pb

import bundles
from imprompt_bench import rig
from imprompt_export import BundleError, BundleFile, EngineError, export
from imprompt_export.backends import tensorrt as tensorrt_backend
from imprompt_export.backends.tensorrt import (
    Builder,
    _attention,
    _digest,
    _network_flags,
    _tell_of_attention,
    compute_capability,
    driver_version,
    fused_attention,
    refit,
)
from imprompt_export.checkpoints import load
from imprompt_export.exporter import bundle_graphs, describe
from imprompt_export.graphs import image_projection
from imprompt_export.onnx_graph import export_onnx
from imprompt_export.profiles import Profile, check_axes
from imprompt_export.repository import _engine_config
from imprompt_serving import config
from imprompt_serving.backends.tensorrt import TENSORRT, TENSORRT_RTX, EngineInfo
from imprompt_serving.gpu.tensorrt import profile_for
from imprompt_serving.wire import Tensor
from tiny import base, control

trt = pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed: imprompt[rtx]")
ENGINE = """
[engine]
backend = "tensorrt_rtx"
precision = "fp16"
targets = ["SM89"]

[shapes]
height = [32, 64, 128]
width = [32, 64, 96]
rows = [1, 2, 2]
frames = [8, 8, 8]
regions = 1
"""
TARGETS = ("SM80", "SM86", "SM89", "SM120")
PROFILE: Profile = {"x": ((1, 4), (2, 4), (8, 4))}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with one of everything, built for compute capability 8.9."""
    folder = tmp_path_factory.mktemp("rtx")
    base.make_sd15(folder / "base", levels=2)
    control.make_motion_adapter(folder / "motion", levels=2)
    net = bundles.controlnet("depth", control.make_controlnet(folder / "depth", levels=2))
    sections = f'\n[motion_adapter]\npath = "motion"\n{net}{bundles._plain(folder, levels=2)}{ENGINE}'
    (folder / "bundle.toml").write_text(f'name = "tiny"\nbase = "base"\n{sections}')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        export(folder / "bundle.toml", folder / "repository", Console(quiet=True))
    return folder / "repository"


def test_every_graph_is_built(repository: Path) -> None:
    denoiser = {file.stem for file in (repository / "tiny_denoiser/1").glob("*.plan")}
    assert denoiser == {
        *("unet", "motion_unet", "controlnet_depth", "controlnet_embedding_depth", "image_projection_plain")
    }
    hosted = {file.parents[1].name for file in repository.glob("*/1/model.plan")}
    assert hosted == {f"tiny_{n}" for n in ("text_encoder", "image_encoder_plain", "vae_encoder", "vae_decoder")}
    assert not list(repository.rglob("*.onnx"))
    report = msgspec.json.decode((repository / "tiny/export.json").read_bytes())
    assert (report["backend"], report["run_by"]) == ("tensorrt_rtx", "onnxruntime")


def test_inputs_outputs_and_ranges_of_the_unet(repository: Path) -> None:
    """As the builder understood the graph; types between models are float32 (docs/graphs.md)."""
    engine = repository / "tiny_denoiser/1/unet.plan"
    info = EngineInfo.load(engine)
    assert (info.target, info.version, info.refit) == ("SM89", trt.__version__, False)
    assert {tensor.dtype for tensor in (*info.inputs.values(), *info.outputs.values())} == {"FLOAT"}
    sample, tokens = info.inputs["sample"], info.inputs["ip_tokens_plain"]
    assert sample.shape == (-1, 4, -1, -1)
    assert sample.profiles == tuple(((rows, 4, 4, 4), (rows, 4, 8, 8), (rows, 4, 16, 12)) for rows in (1, 2))
    assert tokens.profiles == tuple(((rows, 1, 1, 48), (rows, 1, 4, 48), (rows, 1, 1028, 48)) for rows in (1, 2))
    assert info.outputs["noise_pred"].shape == (-1, 4, -1, -1)
    assert {"ip_scale_plain", "ip_bias_plain", "ip_mask_plain_0", "mid_residual"} <= info.inputs.keys()
    content = engine.read_bytes()
    assert all(name.encode() in content for name in (*info.inputs, *info.outputs))


def test_inputs_of_the_others(repository: Path) -> None:
    info = {file.stem: EngineInfo.load(file) for file in (repository / "tiny_denoiser/1").glob("*.plan")}
    info |= {f.parents[1].name.removeprefix("tiny_"): EngineInfo.load(f) for f in repository.glob("*/1/model.plan")}
    motion = info["motion_unet"].inputs["sample"]
    assert (motion.shape, motion.profiles[0][2]) == ((-1, 4, -1, -1, -1), (1, 4, 8, 16, 12))
    assert [high[0] for _, _, high in info["controlnet_depth"].inputs["conditioning_scale"].profiles] == [1, 2]
    assert info["text_encoder"].inputs["input_ids"].dtype == "INT64"
    assert info["vae_decoder"].outputs["images"].dtype == "UINT8"
    assert info["vae_decoder"].inputs["latents"].profiles == (((1, 4, 4, 4), (1, 4, 8, 8), (2, 4, 16, 12)),)
    assert info["vae_encoder"].inputs["sample"].profiles[0][2] == (2, 3, 128, 96)


def test_engines_are_compared_where_they_can_be_run(repository: Path) -> None:
    """Within the profiles that they were built for, and at sizes that belong together: PyTorch takes them too."""
    files = {file.stem: file for file in (repository / "tiny_denoiser/1").glob("*.plan")}
    files |= {file.parents[1].name.removeprefix("tiny_"): file for file in repository.glob("*/1/model.plan")}
    bundle = BundleFile.load(repository.parent / "bundle.toml")
    checkpoints = load(bundle)
    spec = describe(bundle, checkpoints)
    for graph in bundle_graphs(bundle, checkpoints):
        inputs = EngineInfo.load(files[graph.name]).inputs
        count = len(next(iter(inputs.values())).profiles)
        limits = [{n: (t.profiles[i][0], t.profiles[i][2]) for n, t in inputs.items()} for i in range(count)]
        for axes in check_axes(graph, spec):
            example = graph.example(axes)
            profile_for(tuple((name, tuple(example[name].shape)) for name in inputs), limits)
            with torch.no_grad():
                graph.run(example)


def test_triton_asks_for_no_more_than_an_engine_takes(repository: Path) -> None:
    for engine in repository.glob("*/1/model.plan"):
        parsed = text_format.Parse((engine.parents[1] / "config.pbtxt").read_text(), pb.ModelConfig())
        largest = {tensor.profiles[0][2][0] for tensor in EngineInfo.load(engine).inputs.values()}
        assert largest == {parsed.max_batch_size}


def test_triton_hosts_tensorrt_itself() -> None:
    tensors = [Tensor("latents", "FP32", (4, -1, -1))], [Tensor("images", "UINT8", (-1, -1, 3))]
    shapes = {"max_batch_size": 2, "usual_dims": {"latents": (4, 64, 64)}}
    made = config.engine("vae_decoder", *tensors, backend="tensorrt", host="native", **shapes)
    parsed = text_format.Parse(config.to_pbtxt(made), pb.ModelConfig())
    assert (parsed.backend, parsed.platform, parsed.max_batch_size) == ("tensorrt", "tensorrt_plan", 2)
    assert parsed.HasField("dynamic_batching")
    assert not parsed.instance_group  # Triton's default: one on each GPU
    hosted = config.engine("vae_decoder", *tensors, backend="tensorrt", host="python", **shapes)
    assert (hosted.backend, hosted.parameters["engine_backend"].string_value) == ("python", "tensorrt")


def test_triton_warms_up_what_it_hosts_on_a_gpu() -> None:
    """Every number of rows at the usual size, and calls of these are preferred."""
    tensors = [Tensor("latents", "FP32", (4, -1, -1))], [Tensor("images", "UINT8", (-1, -1, 3))]
    shapes = {"max_batch_size": 6, "usual_dims": {"latents": (4, 64, 64)}}
    made = config.engine("vae", *tensors, backend="tensorrt", host="native", devices=(0,), **shapes)
    parsed = text_format.Parse(config.to_pbtxt(made), pb.ModelConfig())
    assert list(parsed.dynamic_batching.preferred_batch_size) == [1, 2, 4, 6]
    assert [sample.batch_size for sample in parsed.model_warmup] == [1, 2, 4, 6]
    assert {tuple(sample.inputs["latents"].dims) for sample in parsed.model_warmup} == {(4, 64, 64)}


@pytest.mark.parametrize("host", ["native", "python"])
def test_an_engine_has_an_instance_on_each_gpu_that_is_named(host: str) -> None:
    tensors = [Tensor("latents", "FP32", (4, -1, -1))], [Tensor("images", "UINT8", (-1, -1, 3))]
    shapes = {"max_batch_size": 2, "usual_dims": {"latents": (4, 64, 64)}}
    made = config.engine("vae", *tensors, backend="tensorrt", host=host, devices=(0, 3), **shapes)
    (group,) = made.instance_group
    assert (group.kind, list(group.gpus), group.count) == (pb.ModelInstanceGroup.KIND_GPU, [0, 3], 1)


@pytest.mark.parametrize(
    ("backend", "host", "devices", "gpus"),
    [
        ("tensorrt", "native", (), [0]),
        ("tensorrt", "native", (1, 2), [1, 2]),
        ("tensorrt", "python", (1, 2), [1, 2]),
        ("tensorrt", "python", (), []),
        ("onnxruntime", "python", (1, 2), []),
    ],
)
def test_the_gpus_of_an_engine(backend: str, host: str, devices: tuple[int, ...], gpus: list[int]) -> None:
    """Triton would give what it hosts itself to all GPUs; a process in which nothing is said takes the first."""
    spec = msgspec.structs.replace(rig.sd15(rows=4), backend=backend, devices=devices)
    graph = image_projection("plain", torch.nn.Identity(), {"image_embeds": (64,)})
    made = _engine_config(spec, host, graph)
    (group,) = made.instance_group
    assert list(group.gpus) == gpus
    assert group.kind == (pb.ModelInstanceGroup.KIND_GPU if gpus else pb.ModelInstanceGroup.KIND_CPU)


def test_float32_is_float32() -> None:
    """TensorRT would multiply with 10 bits where it may."""
    builder = Builder("tensorrt_rtx", targets=["SM89"])
    made = builder._config(trt.Builder(builder._logger))
    assert not made.get_flag(trt.BuilderFlag.TF32)


def test_what_the_runner_calls_is_there() -> None:
    """Nothing can be run without a GPU, but names can be looked up."""
    for owner, names in {
        trt.ExecutionContextAllocationStrategy: ("USER_MANAGED",),
        trt.DynamicShapesKernelSpecializationStrategy: ("EAGER",),
        trt.CudaGraphStrategy: ("WHOLE_GRAPH_CAPTURE",),
        trt.ICudaEngine: ("create_execution_context", "create_runtime_config", "device_memory_size_v2"),
        trt.IRuntimeConfig: (
            *("set_execution_context_allocation_strategy", "dynamic_shapes_kernel_specialization_strategy"),
            *("cuda_graph_strategy", "create_runtime_cache", "set_runtime_cache"),
        ),
        trt.IExecutionContext: (
            *("set_device_memory", "active_optimization_profile", "set_optimization_profile_async"),
            *("set_input_shape", "get_tensor_shape", "set_tensor_address", "execute_async_v3"),
        ),
        trt.Refitter: ("get_missing_weights", "refit_cuda_engine"),
    }.items():
        assert not [name for name in names if not hasattr(owner, name)]


def write(file: Path, weight: float = 1.0, operator: str = "MatMul") -> Path:
    """A graph of one operator with one weight."""
    weights = helper.make_tensor("weight", TensorProto.FLOAT, [4, 4], [weight] * 16)
    node = helper.make_node(operator, ["x", "weight"], ["y"])
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy"]
    graph = helper.make_graph([node], "graph", ends[:1], ends[1:], [weights])
    file.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), file)
    return file


def test_a_second_build_is_skipped(tmp_path: Path) -> None:
    """The same model, settings and version: taken from the cache, without a word of the builder."""
    told: list[str] = []
    engine = tmp_path / "out/engine.plan"

    def build(source: Path, profile: Profile = PROFILE, target: str = "SM89") -> bool:
        told.clear()
        builder = Builder("tensorrt_rtx", targets=[target], cache=tmp_path / "cache")
        builder.build(source, engine, [profile], told.append)
        return bool(told)

    first = write(tmp_path / "a/one.onnx")
    assert build(first)
    content = engine.read_bytes()
    assert not build(write(tmp_path / "b/two.onnx"))
    assert engine.read_bytes() == content
    assert build(write(tmp_path / "c/one.onnx", weight=2.0))
    assert build(first, {"x": ((1, 4), (2, 4), (9, 4))})
    assert build(first, target="SM120")
    assert not build(first)
    shutil.rmtree(tmp_path / "cache")
    assert build(first)
    for described in (tmp_path / "cache").glob("*.json"):
        described.write_bytes(described.read_bytes()[:40])  # a writer of an earlier version was killed
    assert build(first)
    assert not build(first)
    assert EngineInfo.load(engine).target == "SM89"
    assert {file.suffix for file in (tmp_path / "cache").iterdir()} == {".json", ".plan"}


def test_engines_that_can_take_each_others_weights(tmp_path: Path) -> None:
    """Those of equal graphs, built for it. Both building and refitting them needs a GPU; finding them does not."""

    def builder(**arguments: Any) -> Builder:
        return Builder("tensorrt_rtx", targets=["SM89"], cache=tmp_path / "cache", **arguments)

    files = [
        write(tmp_path / f"{name}/net.onnx", weight, operator)
        for name, weight, operator in (("a", 1.0, "MatMul"), ("b", 2.0, "MatMul"), ("c", 1.0, "Gemm"))
    ]
    donor, other, gemm = (builder(refit=True)._info(file, [PROFILE]) for file in files)
    assert donor.architecture == other.architecture != gemm.architecture
    assert donor.model != other.model
    engine = tmp_path / "a/net.plan"
    builder().build(files[0], engine, [PROFILE])
    with pytest.raises(EngineError, match="was made to take weights"):
        builder(refit_from=engine.parent)
    donor.save(engine)
    for name, described in (("damaged", "{"), ("unknown", None)):
        (engine.parent / f"{name}.plan").touch()
        if described:
            (engine.parent / f"{name}.json").write_text(described)
    refitting = builder(refit_from=engine.parent)
    with pytest.raises(EngineError, match="no engine there has the architecture of net"):
        refitting.build(files[2], tmp_path / "out.plan", [PROFILE])
    if not torch.cuda.is_available():
        with pytest.raises(EngineError, match="a refit needs the GPU"):
            refitting.build(files[1], tmp_path / "out.plan", [PROFILE])
        with pytest.raises(EngineError, match=r"engine\.refit needs the GPU"):
            builder(refit=True).build(files[0], engine, [PROFILE])


class FakeRefit:
    """In the place of TensorRT, which refits on a GPU alone: what it was asked, in order, and what went in."""

    def __init__(self, *, parsed: bool = True, missing: tuple[str, ...] = (), taken: bool = True) -> None:
        self.parsed, self.missing, self.taken = parsed, list(missing), taken
        self.asked: list[str] = []

    def Refitter(self, engine: object, logger: object) -> FakeRefit:  # noqa: N802
        return self

    def OnnxParserRefitter(self, refitter: object, logger: object) -> FakeRefit:  # noqa: N802
        return self

    num_errors = 0

    def refit_from_file(self, source: str) -> bool:
        self.asked.append("parse")
        return self.parsed

    def get_missing_weights(self) -> list[str]:
        self.asked.append("missing")
        return self.missing

    def refit_cuda_engine(self) -> bool:
        self.asked.append("refit")
        return self.taken


def test_a_refit_is_carried_out() -> None:
    """The parser has the weights ready; the engine has them after ``refit_cuda_engine``."""
    fake = FakeRefit()
    refit(fake, None, None, Path("net.onnx"))
    assert fake.asked == ["parse", "missing", "refit"]


@pytest.mark.parametrize(
    ("fake", "message"),
    [
        (FakeRefit(parsed=False), "net: no reason given"),
        (FakeRefit(missing=("conv.bias", "other")), r"net lacks 2 weights of the engine, such as conv\.bias"),
        (FakeRefit(taken=False), "does not take the weights of net"),
    ],
)
def test_a_refit_that_fails(fake: FakeRefit, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        refit(fake, None, None, Path("net.onnx"))


def test_exported_graphs_are_told_apart(tmp_path: Path) -> None:
    """The same weights are the same model, others are another model of the same architecture."""

    def info(name: str, seed: int) -> EngineInfo:
        torch.manual_seed(seed)
        layer = ImageProjection(image_embed_dim=64, cross_attention_dim=48, num_image_text_embeds=4)
        graph = image_projection("plain", layer.eval(), {"image_embeds": (64,)})
        export_onnx(graph, tmp_path / name / "net.onnx", torch.float16)
        profile: Profile = {"image_embeds": ((1, 64), (1, 64), (4, 64))}
        return Builder("tensorrt_rtx", targets=["SM89"])._info(tmp_path / name / "net.onnx", [profile])

    first, again, other = info("a", 0), info("b", 0), info("c", 1)
    assert first == again
    assert first.architecture == other.architecture
    assert first.model != other.model


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_weights_there_and_back(tmp_path: Path) -> None:
    """A -> B -> A: each engine computes with the weights that it was given last."""
    if compute_capability() not in TARGETS:
        pytest.skip(f"the engines are for {', '.join(TARGETS)}, and the GPU is an {compute_capability()}")
    sources = {name: write(tmp_path / name / "net.onnx", weight) for name, weight in (("a", 1.0), ("b", 2.0))}
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    Builder("tensorrt_rtx", targets=TARGETS, cache=tmp_path / "0", refit=True).build(
        sources["a"], tmp_path / "0/net.plan", [PROFILE]
    )
    answers = [TENSORRT_RTX.load(tmp_path / "0/net.plan").run({"x": x})["y"]]
    for step, name in enumerate("ba", start=1):
        builder = Builder(
            "tensorrt_rtx", targets=TARGETS, cache=tmp_path / f"cache{step}", refit_from=tmp_path / str(step - 1)
        )
        builder.build(sources[name], tmp_path / f"{step}/net.plan", [PROFILE])
        answers.append(TENSORRT_RTX.load(tmp_path / f"{step}/net.plan").run({"x": x})["y"])
    np.testing.assert_array_equal(answers[1], 2 * answers[0])
    np.testing.assert_array_equal(answers[2], answers[0])


def test_refit_without_an_engine(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"made to take weights \(engine\.refit = true\)"):
        Builder("tensorrt_rtx", targets=["SM89"], refit_from=tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "bundle.toml").write_text('name = "tiny"\nbase = "base"\n')
    with pytest.raises(BundleError, match=r"--refit-from is for TensorRT.s engines; engine\.backend is onnxruntime"):
        export(tmp_path / "bundle.toml", tmp_path / "repository", refit_from=tmp_path)


def test_a_graph_that_is_refused(tmp_path: Path) -> None:
    builder = Builder("tensorrt_rtx", targets=["SM89"], cache=tmp_path / "cache")
    with pytest.raises(EngineError, match=r"cannot read broken: .*NoSuchOperator"):
        builder.build(write(tmp_path / "broken.onnx", operator="NoSuchOperator"), tmp_path / "broken.plan", [PROFILE])


def test_a_target_that_does_not_exist() -> None:
    with pytest.raises(
        EngineError, match=r"SM70; tensorrt_rtx builds for SM75 \(7\.5\), .*SM89 \(8\.9\), SM120 \(12\.0\)"
    ):
        Builder("tensorrt_rtx", targets=["SM89", "SM70"])


@pytest.mark.parametrize(("target", "name"), [("SM90", "Hopper .*H100, H200"), ("SM100", "Blackwell .*B200")])
def test_data_center_gpus_are_refused_by_name(target: str, name: str) -> None:
    with pytest.raises(EngineError, match=rf'not for {name}.*: use engine\.backend = "tensorrt", "inductor" or'):
        Builder("tensorrt_rtx", targets=["SM89", target])


def rtx_builder(cache: Path) -> Builder:
    return Builder("tensorrt_rtx", targets=["SM89"], cache=cache)


def test_shapes_that_are_refused(tmp_path: Path) -> None:
    """`set_shape` has no answer: a smallest shape above the usual one shows when the profile is added."""
    file = write(tmp_path / "net.onnx")
    with pytest.raises(EngineError, match="does not take optimization profile 1 of net"):
        rtx_builder(tmp_path / "cache").build(file, tmp_path / "net.plan", [PROFILE, {"x": ((4, 4), (2, 4), (8, 4))}])


@pytest.mark.parametrize(("version", "flags"), [("10.13.0", 1), ("11.4.0", 0), (trt.__version__, 0)])
def test_networks_are_strongly_typed(version: str, flags: int) -> None:
    """By a flag in TensorRT 10; the others have no other kind."""
    package = SimpleNamespace(__version__=version, NetworkDefinitionCreationFlag=trt.NetworkDefinitionCreationFlag)
    assert _network_flags(package) == flags
    network = trt.Builder(trt.Logger(trt.Logger.ERROR)).create_network(_network_flags(trt))
    assert network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


class FakeTimings:
    """In the place of TensorRT's settings; `taken` are its answers to `set_timing_cache`, in order."""

    def __init__(self, *taken: bool) -> None:
        self.taken, self.given = list(taken), list[bytes]()

    def create_timing_cache(self, content: bytes) -> bytes:
        return content

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        self.given.append(cache)
        return self.taken.pop(0)

    def get_timing_cache(self) -> SimpleNamespace:
        return SimpleNamespace(serialize=lambda: b"new")


@pytest.fixture
def timing(tmp_path: Path) -> Builder:
    """A builder that keeps timings, as TensorRT's do; TensorRT-RTX has none."""
    builder = rtx_builder(tmp_path)
    builder._targets = ()
    return builder


def test_timings_of_another_gpu_are_not_used(timing: Builder) -> None:
    timing._keep_timings(FakeTimings())
    for taken, given in (([True], [b"new"]), ([False, True], [b"new", b""])):
        config = FakeTimings(*taken)
        timing._set_timings(config)
        assert config.given == given
    with pytest.raises(EngineError, match="does not take an empty timing cache"):
        timing._set_timings(FakeTimings(False, False))


def test_an_engine_is_kept_before_its_timings(
    tmp_path: Path, timing: Builder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    there: list[list[str]] = []
    builder = rtx_builder(tmp_path / "cache")
    monkeypatch.setattr(
        builder, "_keep_timings", lambda _: there.append(sorted(f.suffix for f in (tmp_path / "cache").iterdir()))
    )
    builder.build(write(tmp_path / "net.onnx"), tmp_path / "net.plan", [PROFILE])
    assert there == [[".json", ".plan"]]

    def full(file: Path, content: bytes) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(tensorrt_backend, "write_atomically", full)
    timing._keep_timings(FakeTimings())
    assert "timings of this build are not kept: No space left" in caplog.text


class FakeDriver:
    """In the place of NVML."""

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlSystemGetDriverVersion(self, answer: Any, size: int) -> int:  # noqa: N802
        answer.value = b"580.95.05"
        return 0


def test_driver_and_cuda_are_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="version of NVIDIA's driver is not to be had"):
        driver_version()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeDriver())
    assert driver_version() == "580.95.05"
    keys = set()
    for versions in ("", "driver 580.95.05, CUDA 13.0", "driver 590.10.01, CUDA 13.0"):
        builder = rtx_builder(tmp_path)
        builder._platform = versions
        keys |= {_digest(builder._info(write(tmp_path / "net.onnx"), [PROFILE])), builder._timings}
    assert len(keys) == 6


class FakeEngine:
    """In the place of an engine, which no GPU here can load; `layers` are what its inspector says."""

    def __init__(self, layers: list[Any]) -> None:
        self._layers = layers

    def create_engine_inspector(self) -> FakeEngine:
        return self

    def get_engine_information(self, kind: Any) -> str:
        assert kind == trt.LayerInformationFormat.JSON
        return json.dumps({"Layers": self._layers})


@pytest.mark.parametrize(
    ("layers", "fused"),
    [
        (["conv + silu", "_gemm_mha_v2_myl3_6", "_gemv_mha_v1_myl3_9", "node_scaled_dot_product_attention"], 2),
        ([{"Name": "__mye8037_gemm_mha_v2", "TacticName": ""}, {"Name": "fmha_sm90"}, {"Name": "alphamhat"}], 2),
        (["_gemm_mha_v2", "_gemm_mha_v2_1", "_gemm_mha_v2 [profile 1]", "softmax [profile 1]"], 1),
        ([], 0),
    ],
)
def test_fused_attention_is_counted(layers: list[Any], fused: int) -> None:
    assert fused_attention(trt, FakeEngine(layers)) == fused
    assert fused_attention(trt, None) is None


def test_attention_layers_that_are_not_fused(caplog: pytest.LogCaptureFixture) -> None:
    network = trt.Builder(trt.Logger(trt.Logger.ERROR)).create_network(0)
    tensor = network.add_input("x", trt.float32, (2, 4))
    for _ in range(3):
        tensor = network.add_softmax(tensor).get_output(0)
    assert _attention(trt, network) == 3
    fields = ("backend", "version", "target", "model", "architecture", "settings")
    info = EngineInfo(**dict.fromkeys(fields, ""), refit=False)
    told: list[str] = []
    _tell_of_attention("unet", msgspec.structs.replace(info, attention=3, fused_attention=3), told.append)
    assert not caplog.records
    _tell_of_attention("unet", msgspec.structs.replace(info, attention=3, fused_attention=1), told.append)
    assert "unet: TensorRT fused 1 of 3 attention layers" in caplog.text
    assert told == ["3 of 3 attention layers are fused", "1 of 3 attention layers are fused"]


def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match=r'"tensorrt" needs tensorrt: pip install "imprompt\[gpu\]"'):
        TENSORRT.package()
    monkeypatch.setattr(trt, "__version__", "1.1.0")
    with pytest.raises(EngineError, match=r"tensorrt_rtx 1\.1\.0 is too old; 1\.4 or newer"):
        TENSORRT_RTX.package()


def test_engines_without_a_gpu(tmp_path: Path, repository: Path) -> None:
    engine = repository / "tiny_text_encoder/1/model.plan"
    with pytest.raises(EngineError, match=r"model\.plan is an engine of tensorrt_rtx, which needs an NVIDIA GPU"):
        TENSORRT_RTX.load(engine)
    with pytest.raises(EngineError, match=rf"built by tensorrt_rtx {trt.__version__}, but 9\.9 is installed"):
        EngineInfo.check(engine, "9.9")
