"""TensorRT engines, as far as they can be tested without a GPU: TensorRT-RTX can build but not run them."""

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
    _attention_layers,
    _digest,
    _network_flags,
    _report_attention,
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
    """Export a bundle with one network of every kind, built for compute capability 8.9."""
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


def test_unet_has_the_declared_inputs_outputs_and_ranges(repository: Path) -> None:
    """The description comes from the builder. Residuals of ControlNets have the type of the engine (docs/graphs.md)."""
    engine = repository / "tiny_denoiser/1/unet.plan"
    info = EngineInfo.load(engine)
    assert (info.target, info.version, info.refit) == ("SM89", trt.__version__, False)
    half = {name for name, tensor in (info.inputs | info.outputs).items() if tensor.dtype == "HALF"}
    assert half == {name for name in info.inputs if "residual" in name}
    assert all(tensor.dtype in ("FLOAT", "HALF") for tensor in (info.inputs | info.outputs).values())
    sample, tokens = info.inputs["sample"], info.inputs["ip_tokens_plain"]
    assert sample.shape == (-1, 4, -1, -1)
    assert sample.profiles == tuple(((rows, 4, 4, 4), (rows, 4, 8, 8), (rows, 4, 16, 12)) for rows in (1, 2))
    assert tokens.profiles == tuple(((rows, 1, 1, 48), (rows, 1, 4, 48), (rows, 1, 1028, 48)) for rows in (1, 2))
    assert info.outputs["noise_pred"].shape == (-1, 4, -1, -1)
    assert {"ip_scale_plain", "ip_bias_plain", "ip_mask_plain_0", "mid_residual"} <= info.inputs.keys()
    content = engine.read_bytes()
    assert all(name.encode() in content for name in (*info.inputs, *info.outputs))


def test_other_engines_have_the_declared_inputs(repository: Path) -> None:
    info = {file.stem: EngineInfo.load(file) for file in (repository / "tiny_denoiser/1").glob("*.plan")}
    info |= {f.parents[1].name.removeprefix("tiny_"): EngineInfo.load(f) for f in repository.glob("*/1/model.plan")}
    motion = info["motion_unet"].inputs["sample"]
    assert (motion.shape, motion.profiles[0][2]) == ((-1, 4, -1, -1, -1), (1, 4, 8, 16, 12))
    assert [high[0] for _, _, high in info["controlnet_depth"].inputs["conditioning_scale"].profiles] == [1, 2]
    assert info["text_encoder"].inputs["input_ids"].dtype == "INT64"
    assert info["vae_decoder"].outputs["images"].dtype == "UINT8"
    assert info["vae_decoder"].inputs["latents"].profiles == (((1, 4, 4, 4), (1, 4, 8, 8), (2, 4, 16, 12)),)
    assert info["vae_encoder"].inputs["sample"].profiles[0][2] == (2, 3, 128, 96)


def test_engines_are_compared_at_sizes_within_their_profiles(repository: Path) -> None:
    """The sizes are also consistent with each other: PyTorch accepts them."""
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


def test_max_batch_size_matches_the_largest_profile(repository: Path) -> None:
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


def test_engines_hosted_by_triton_are_warmed_up() -> None:
    """Triton warms up every bucket of rows at the usual size, and prefers batches of these sizes."""
    tensors = [Tensor("latents", "FP32", (4, -1, -1))], [Tensor("images", "UINT8", (-1, -1, 3))]
    shapes = {"max_batch_size": 6, "usual_dims": {"latents": (4, 64, 64)}}
    made = config.engine("vae", *tensors, backend="tensorrt", host="native", devices=(0,), **shapes)
    parsed = text_format.Parse(config.to_pbtxt(made), pb.ModelConfig())
    assert list(parsed.dynamic_batching.preferred_batch_size) == [1, 2, 4, 6]
    assert [sample.batch_size for sample in parsed.model_warmup] == [1, 2, 4, 6]
    assert {tuple(sample.inputs["latents"].dims) for sample in parsed.model_warmup} == {(4, 64, 64)}


@pytest.mark.parametrize("host", ["native", "python"])
def test_engine_has_an_instance_on_each_listed_gpu(host: str) -> None:
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
def test_gpus_of_an_engine(backend: str, host: str, devices: tuple[int, ...], gpus: list[int]) -> None:
    """By default Triton would put engines that it hosts on all GPUs, and a Python process uses the first."""
    spec = msgspec.structs.replace(rig.sd15(rows=4), backend=backend, devices=devices)
    graph = image_projection("plain", torch.nn.Identity(), {"image_embeds": (64,)})
    made = _engine_config(spec, host, graph)
    (group,) = made.instance_group
    assert list(group.gpus) == gpus
    assert group.kind == (pb.ModelInstanceGroup.KIND_GPU if gpus else pb.ModelInstanceGroup.KIND_CPU)


def test_float32_engines_do_not_use_tf32() -> None:
    """By default TensorRT multiplies float32 with a 10-bit mantissa."""
    builder = Builder("tensorrt_rtx", targets=["SM89"])
    made = builder._config(trt.Builder(builder._logger))
    assert not made.get_flag(trt.BuilderFlag.TF32)


def test_names_that_the_runner_uses_exist() -> None:
    """Without a GPU nothing can run, but names can be looked up."""
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
    """Write an ONNX file with one operator and one weight."""
    weights = helper.make_tensor("weight", TensorProto.FLOAT, [4, 4], [weight] * 16)
    node = helper.make_node(operator, ["x", "weight"], ["y"])
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy"]
    graph = helper.make_graph([node], "graph", ends[:1], ends[1:], [weights])
    file.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), file)
    return file


def test_second_build_is_skipped(tmp_path: Path) -> None:
    """The same model, settings, and version come from the cache, without any status from the builder."""
    statuses: list[str] = []
    engine = tmp_path / "out/engine.plan"

    def build(source: Path, profile: Profile = PROFILE, target: str = "SM89") -> bool:
        statuses.clear()
        builder = Builder("tensorrt_rtx", targets=[target], cache=tmp_path / "cache")
        builder.build(source, engine, [profile], statuses.append)
        return bool(statuses)

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
        described.write_bytes(described.read_bytes()[:40])  # as if an export had been killed while writing
    assert build(first)
    assert not build(first)
    assert EngineInfo.load(engine).target == "SM89"
    assert {file.suffix for file in (tmp_path / "cache").iterdir()} == {".json", ".plan"}


def test_engines_to_refit_are_found(tmp_path: Path) -> None:
    """They have equal graphs and `refit = true`. Building and refitting them needs a GPU; finding them does not."""

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
    with pytest.raises(EngineError, match=r"was built with engine\.refit = true"):
        builder(refit_from=engine.parent)
    donor.save(engine)
    for name, described in (("damaged", "{"), ("unknown", None)):
        (engine.parent / f"{name}.plan").touch()
        if described:
            (engine.parent / f"{name}.json").write_text(described)
    refitting = builder(refit_from=engine.parent)
    with pytest.raises(EngineError, match="no engine there can take the weights of net"):
        refitting.build(files[2], tmp_path / "out.plan", [PROFILE])
    if not torch.cuda.is_available():
        with pytest.raises(EngineError, match="a refit needs the GPU"):
            refitting.build(files[1], tmp_path / "out.plan", [PROFILE])
        with pytest.raises(EngineError, match=r"engine\.refit needs a GPU at the export"):
            builder(refit=True).build(files[0], engine, [PROFILE])


class FakeRefit:
    """Stands in for TensorRT, which can only refit on a GPU, and records its calls in order."""

    def __init__(self, *, parsed: bool = True, missing: tuple[str, ...] = (), accepted: bool = True) -> None:
        self.parsed, self.missing, self.accepted = parsed, list(missing), accepted
        self.calls: list[str] = []

    def Refitter(self, engine: object, logger: object) -> FakeRefit:  # noqa: N802
        return self

    def OnnxParserRefitter(self, refitter: object, logger: object) -> FakeRefit:  # noqa: N802
        return self

    num_errors = 0

    def refit_from_file(self, source: str) -> bool:
        self.calls.append("parse")
        return self.parsed

    def get_missing_weights(self) -> list[str]:
        self.calls.append("missing")
        return self.missing

    def refit_cuda_engine(self) -> bool:
        self.calls.append("refit")
        return self.accepted


def test_refit_calls_parser_and_refitter() -> None:
    """The parser only prepares the weights; the engine has them after `refit_cuda_engine`."""
    fake = FakeRefit()
    refit(fake, None, None, Path("net.onnx"))
    assert fake.calls == ["parse", "missing", "refit"]


@pytest.mark.parametrize(
    ("fake", "message"),
    [
        (FakeRefit(parsed=False), "net: no reason given"),
        (FakeRefit(missing=("conv.bias", "other")), r"net lacks 2 weights of the engine, such as conv\.bias"),
        (FakeRefit(accepted=False), "the engine rejected the weights of net"),
    ],
)
def test_failed_refit_raises(fake: FakeRefit, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        refit(fake, None, None, Path("net.onnx"))


def test_models_and_architectures_are_distinguished(tmp_path: Path) -> None:
    """Equal weights make the same model; other weights make another model of the same architecture."""

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
def test_weights_can_be_replaced_and_restored(tmp_path: Path) -> None:
    """After A, B, and A again, each engine computes with the weights that it was given last."""
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


def test_refit_without_an_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"was built with engine\.refit = true"):
        Builder("tensorrt_rtx", targets=["SM89"], refit_from=tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "bundle.toml").write_text('name = "tiny"\nbase = "base"\n')
    with pytest.raises(BundleError, match=r"--refit-from only works with TensorRT engines, .* is onnxruntime"):
        export(tmp_path / "bundle.toml", tmp_path / "repository", refit_from=tmp_path)


def test_unknown_operator_is_reported(tmp_path: Path) -> None:
    builder = Builder("tensorrt_rtx", targets=["SM89"], cache=tmp_path / "cache")
    with pytest.raises(EngineError, match=r"cannot read broken: .*NoSuchOperator"):
        builder.build(write(tmp_path / "broken.onnx", operator="NoSuchOperator"), tmp_path / "broken.plan", [PROFILE])


def test_unknown_target_is_refused() -> None:
    with pytest.raises(
        EngineError, match=r"must be among SM75 \(7\.5\), .*SM89 \(8\.9\), SM120 \(12\.0\).* for tensorrt_rtx, .*SM70"
    ):
        Builder("tensorrt_rtx", targets=["SM89", "SM70"])


@pytest.mark.parametrize(("target", "name"), [("SM90", "Hopper .*H100, H200"), ("SM100", "Blackwell .*B200")])
def test_data_center_gpus_are_refused_by_name(target: str, name: str) -> None:
    with pytest.raises(
        EngineError, match=rf'does not support {name}.*: use engine\.backend = "tensorrt", "inductor" or'
    ):
        Builder("tensorrt_rtx", targets=["SM89", target])


def rtx_builder(cache: Path) -> Builder:
    return Builder("tensorrt_rtx", targets=["SM89"], cache=cache)


def test_invalid_profile_is_refused(tmp_path: Path) -> None:
    """`set_shape` returns nothing: a minimum above the usual shape only shows when the profile is added."""
    file = write(tmp_path / "net.onnx")
    with pytest.raises(EngineError, match="rejected optimization profile 1 of net"):
        rtx_builder(tmp_path / "cache").build(file, tmp_path / "net.plan", [PROFILE, {"x": ((4, 4), (2, 4), (8, 4))}])


@pytest.mark.parametrize(("version", "flags"), [("10.13.0", 1), ("11.4.0", 0), (trt.__version__, 0)])
def test_networks_are_strongly_typed(version: str, flags: int) -> None:
    """TensorRT 10 needs a flag; later versions and TensorRT-RTX have no other kind."""
    package = SimpleNamespace(__version__=version, NetworkDefinitionCreationFlag=trt.NetworkDefinitionCreationFlag)
    assert _network_flags(package) == flags
    network = trt.Builder(trt.Logger(trt.Logger.ERROR)).create_network(_network_flags(trt))
    assert network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


class FakeTimings:
    """Stands in for TensorRT's settings; `accepted` are its answers to `set_timing_cache`, in order."""

    def __init__(self, *accepted: bool) -> None:
        self.accepted, self.given = list(accepted), list[bytes]()

    def create_timing_cache(self, content: bytes) -> bytes:
        return content

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        self.given.append(cache)
        return self.accepted.pop(0)

    def get_timing_cache(self) -> SimpleNamespace:
        return SimpleNamespace(serialize=lambda: b"new")


@pytest.fixture
def timing(tmp_path: Path) -> Builder:
    """A builder that saves kernel timings, as for TensorRT; for TensorRT-RTX there are none."""
    builder = rtx_builder(tmp_path)
    builder._targets = ()
    return builder


def test_timings_of_another_gpu_are_not_used(timing: Builder) -> None:
    timing._keep_timings(FakeTimings())
    for accepted, given in (([True], [b"new"]), ([False, True], [b"new", b""])):
        config = FakeTimings(*accepted)
        timing._set_timings(config)
        assert config.given == given
    with pytest.raises(EngineError, match="rejected an empty timing cache"):
        timing._set_timings(FakeTimings(False, False))


def test_engine_is_cached_before_its_timings(
    tmp_path: Path, timing: Builder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cached: list[list[str]] = []
    builder = rtx_builder(tmp_path / "cache")
    monkeypatch.setattr(
        builder, "_keep_timings", lambda _: cached.append(sorted(f.suffix for f in (tmp_path / "cache").iterdir()))
    )
    builder.build(write(tmp_path / "net.onnx"), tmp_path / "net.plan", [PROFILE])
    assert cached == [[".json", ".plan"]]

    def full(file: Path, content: bytes) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(tensorrt_backend, "write_atomically", full)
    timing._keep_timings(FakeTimings())
    assert "cannot save the kernel timings of this build: No space left" in caplog.text


class FakeDriver:
    """Stands in for NVML."""

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlSystemGetDriverVersion(self, answer: Any, size: int) -> int:  # noqa: N802
        answer.value = b"580.95.05"
        return 0


def test_cache_keys_depend_on_driver_and_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="cannot read the version of NVIDIA's driver"):
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
    """Stands in for an engine, which cannot be loaded without a GPU; its inspector returns `layers`."""

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


def test_unfused_attention_layers_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    network = trt.Builder(trt.Logger(trt.Logger.ERROR)).create_network(0)
    tensor = network.add_input("x", trt.float32, (2, 4))
    for _ in range(3):
        tensor = network.add_softmax(tensor).get_output(0)
    assert _attention_layers(trt, network) == 3
    fields = ("backend", "version", "target", "model", "architecture", "settings")
    info = EngineInfo(**dict.fromkeys(fields, ""), refit=False)
    statuses: list[str] = []
    _report_attention("unet", msgspec.structs.replace(info, attention=3, fused_attention=3), statuses.append)
    assert not caplog.records
    _report_attention("unet", msgspec.structs.replace(info, attention=3, fused_attention=1), statuses.append)
    assert "unet: TensorRT fused 1 of 3 attention layers" in caplog.text
    assert statuses == ["3 of 3 attention layers are fused", "1 of 3 attention layers are fused"]


def test_missing_or_old_packages_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match=r'"tensorrt" needs tensorrt: pip install "imprompt\[gpu\]"'):
        TENSORRT.package()
    monkeypatch.setattr(trt, "__version__", "1.1.0")
    with pytest.raises(EngineError, match=r"tensorrt_rtx 1\.1\.0 is too old; 1\.4 or newer"):
        TENSORRT_RTX.package()


def test_loading_engines_without_a_gpu_is_refused(tmp_path: Path, repository: Path) -> None:
    engine = repository / "tiny_text_encoder/1/model.plan"
    with pytest.raises(EngineError, match=r"model\.plan is an engine of tensorrt_rtx, which needs an NVIDIA GPU"):
        TENSORRT_RTX.load(engine)
    with pytest.raises(EngineError, match=rf"built by tensorrt_rtx {trt.__version__}, but 9\.9 is installed"):
        EngineInfo.check(engine, "9.9")
