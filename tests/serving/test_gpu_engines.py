"""Engines that keep tensors on a device. Tests that need CUDA are marked `gpu`; the others run on the CPU."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from imprompt_export.backends.tensorrt import Builder, compute_capability
from imprompt_serving.backends import MODULES, EngineError, get_backend
from imprompt_serving.backends import onnxruntime as onnxruntime_engine
from imprompt_serving.backends.tensorrt import TENSORRT_RTX, EngineInfo
from imprompt_serving.gpu import DeviceEngine, run_on_tensors
from imprompt_serving.gpu.cuda_graphs import GRAPHS, GraphedEngine, PreparedCall, capturing
from imprompt_serving.gpu.lru_cache import LRUCache
from imprompt_serving.gpu.onnxruntime import OnnxRuntimeDeviceEngine
from imprompt_serving.gpu.tensorrt import TensorRTEngine, profile_for

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
without_cuda = pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="ONNX Runtime is the one for GPUs"
)
TARGETS = ("SM80", "SM86", "SM89", "SM120")
PROFILES = [
    {"sample": ((1, 4, 8), (16, 4, 64)), "tokens": ((1, 1), (16, 64))},
    {"sample": ((1, 4, 8), (16, 4, 128)), "tokens": ((1, 1), (16, 16))},
]


@pytest.mark.parametrize(
    ("sample", "tokens", "profile"), [((2, 4, 64), (2, 64), 0), ((2, 4, 128), (2, 16), 1), ((1, 4, 8), (1, 1), 0)]
)
def test_the_first_profile_that_fits(sample: tuple[int, ...], tokens: tuple[int, ...], profile: int) -> None:
    assert profile_for((("sample", sample), ("tokens", tokens)), PROFILES) == profile


@pytest.mark.parametrize("sample", [(17, 4, 8), (1, 3, 8), (1, 4, 129), (1, 4)])
def test_shapes_outside_of_all_profiles_are_refused(sample: tuple[int, ...]) -> None:
    with pytest.raises(
        EngineError, match=r"takes sample of \[1, 4, 8\] to \[16, 4, 64\] or .*, not \[.*see \[shapes\]"
    ):
        profile_for((("sample", sample), ("tokens", (1, 1))), PROFILES)


def test_the_cache_keeps_recently_used_values() -> None:
    made: list[str] = []
    recent: LRUCache[str] = LRUCache(2)

    def get(key: str) -> str:
        return recent.get(key, lambda: made.append(key) or key)  # type: ignore[func-returns-value]

    assert [get(key) for key in "abacab"] == list("abacab")
    assert made == ["a", "b", "c", "b"]


def test_the_cache_waits_before_it_drops_a_value() -> None:
    waited: list[str] = []
    recent: LRUCache[str] = LRUCache(1, before_dropping=lambda: waited.append("."))
    for key in "aab":
        recent.get(key, partial(str, key))
    assert waited == ["."]


def test_the_cache_drops_a_value_before_it_makes_the_next() -> None:
    """So that buffers of one shape are freed before those of another are allocated."""
    alive: set[int] = set()

    class Buffer:
        def __init__(self) -> None:
            assert not alive
            alive.add(id(self))

        def __del__(self) -> None:
            alive.discard(id(self))

    recent: LRUCache[Buffer] = LRUCache(1)
    for key in "abc":
        recent.get(key, Buffer)
    assert len(alive) == 1


def write(file: Path) -> Path:
    """Write an engine for y = 2 x, and the mean of x along its last axis. It lacks an input that nothing uses."""
    nodes = [helper.make_node("Mul", ["x", "two"], ["y"]), helper.make_node("ReduceMean", ["x", "last"], ["mean"])]
    constants = [
        helper.make_tensor("two", TensorProto.FLOAT, [], [2.0]),
        helper.make_tensor("last", TensorProto.INT64, [1], [-1]),
    ]
    shapes = {"x": ["rows", "w"], "y": ["rows", "w"], "mean": ["rows", 1]}
    x, y, mean = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items())
    graph = helper.make_graph(nodes, "graph", [x], [y, mean], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), file)
    return file


def check(engine: DeviceEngine, device: str) -> None:
    """Check outputs of several shapes, one of them twice, and that later calls do not overwrite earlier outputs."""
    answers = []
    for rows, width in ((1, 3), (4, 2), (1, 3), (2, 5)):
        x = torch.randn(width, rows, device=device).T  # not contiguous
        answer = engine.run_tensors({"x": x, "unused": torch.ones(1, device=device)})
        answers.append((x, answer))
    for x, answer in answers:
        assert answer["y"].device == x.device
        torch.testing.assert_close(answer["y"], 2 * x)
        torch.testing.assert_close(answer["mean"], x.mean(-1, keepdim=True))


def test_onnxruntime_on_tensors(tmp_path: Path) -> None:
    """With IOBinding as on a GPU, but on the CPU."""
    engine = OnnxRuntimeDeviceEngine(write(tmp_path / "model.onnx"), "cpu")
    check(engine, "cpu")
    x = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(engine.run({"x": x})["y"], 2 * x)


def test_engines_on_arrays_and_on_tensors_are_called_alike(tmp_path: Path) -> None:
    file = write(tmp_path / "model.onnx")
    x = torch.arange(6.0).reshape(2, 3)
    for engine in (get_backend("onnxruntime").load(file), OnnxRuntimeDeviceEngine(file, "cpu")):
        assert torch.equal(run_on_tensors(engine, {"x": x})["y"], 2 * x)


@without_cuda
def test_a_gpu_that_onnxruntime_cannot_use_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise it would silently run on the CPU. CUDA libraries are preloaded, and its error messages are shown."""
    told: list[object] = []
    monkeypatch.setattr(onnxruntime_engine, "built_for_cuda", lambda: True)
    monkeypatch.setattr(onnxruntime_engine, "has_gpu", lambda: True)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: told.append("libraries"))
    monkeypatch.setattr(onnxruntime, "set_default_logger_severity", told.append)
    with pytest.warns(UserWarning, match="CUDA"), pytest.raises(EngineError, match=r"cannot use the GPU: .*cuDNN"):
        get_backend("onnxruntime").load(write(tmp_path / "model.onnx"))
    assert told == [3, "libraries"]
    monkeypatch.setattr(onnxruntime_engine, "has_gpu", lambda: False)
    get_backend("onnxruntime").load(write(tmp_path / "model.onnx"))


class FakeSession:
    """A session on a GPU that runs some nodes on the CPU."""

    def __init__(self, placed: dict[str, tuple[str, ...]]) -> None:
        self._placed = placed

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(ep_name=name, get_nodes=lambda kinds=kinds: [SimpleNamespace(op_type=k) for k in kinds])
            for name, kinds in self._placed.items()
        ]


def test_a_session_on_a_gpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Check its options, and that a warning names the nodes on the CPU, except for those that compute shapes."""
    asked: dict[str, str] = {}
    severities: list[int] = []
    placed = {
        "CUDAExecutionProvider": ("Conv", "MultiHeadAttention"),
        "CPUExecutionProvider": ("Shape", "Resize", "Concat", "Resize", "MatMul"),
    }

    def made(
        path: str, options: onnxruntime.SessionOptions, providers: list[tuple[str, dict[str, str]]]
    ) -> FakeSession:
        asked.update(providers[0][1])
        assert options.get_session_config_entry("session.record_ep_graph_assignment_info") == "1"
        return FakeSession(placed)

    monkeypatch.setattr(onnxruntime_engine, "built_for_cuda", lambda: True)
    monkeypatch.setattr(onnxruntime_engine, "has_gpu", lambda: True)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(onnxruntime, "set_default_logger_severity", severities.append)
    monkeypatch.setattr(onnxruntime, "InferenceSession", made)
    onnxruntime_engine.session(Path("unet.onnx"), gpu=1, stream=4711)
    assert asked["cudnn_conv_algo_search"] == "HEURISTIC"
    assert (asked["device_id"], asked["user_compute_stream"], asked["use_tf32"]) == ("1", "4711", "0")
    assert severities == [3, 4]
    (record,) = caplog.records
    assert record.getMessage().endswith("no GPU kernel for 2 Resize, 1 MatMul, so these run on the CPU")


def test_where_nodes_are_placed(tmp_path: Path) -> None:
    """As reported by a real session, which runs entirely on the CPU here."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    made = onnxruntime.InferenceSession(str(write(tmp_path / "model.onnx")), options, ["CPUExecutionProvider"])
    assert onnxruntime_engine.cpu_fallbacks(made) == {"ReduceMean": 1}  # not `Mul`, which may compute shapes


@without_cuda
def test_the_cpu_build_of_onnxruntime_refuses_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="install onnxruntime-gpu"):
        get_backend("onnxruntime").load(write(tmp_path / "model.onnx"), device="cuda:0")


class FakeGraph:
    """Replaces a CUDA graph. If `broken`, something was launched that cannot be captured."""

    def __init__(self, told: list[str], *, broken: bool = False) -> None:
        self.told, self.broken = told, broken

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        self.told.append(f"begin {capture_error_mode}")

    def capture_end(self) -> None:
        self.told.append("end")
        if self.broken:
            raise RuntimeError("capture was invalidated")


@pytest.mark.parametrize("broken", [False, True])
def test_a_capture_always_ends(monkeypatch: pytest.MonkeyPatch, broken: bool) -> None:
    """Also for torch's allocator, which waits for the end of captures."""
    told: list[str] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(told, broken=broken))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch._C, "_cuda_endAllocateToPool", lambda device, pool: told.append(f"close {pool}"), raising=False
    )
    failing = pytest.raises(RuntimeError, match="invalidated") if broken else contextlib.nullcontext()
    with failing, capturing():
        told.append("launch")
    assert told == ["begin thread_local", "launch", "end", *(["close (0, 1)"] if broken else [])]


class FakeStream:
    """Replaces a CUDA stream, and records what is ordered after what."""

    device = torch.device("cpu")

    def __init__(self, name: str, waits: list[str]) -> None:
        self._name, self._waits = name, waits

    def wait_stream(self, other: FakeStream) -> None:
        self._waits.append(f"{self._name} after {other._name}")

    def synchronize(self) -> None:
        self._waits.append(f"host after {self._name}")


class Doubling(GraphedEngine):
    """y = 2 x and the mean of x, in buffers per shape as on a GPU."""

    def _prepare(self, given: Any) -> PreparedCall:
        x = torch.zeros_like(given["x"], memory_format=torch.contiguous_format)
        outputs = {"y": torch.zeros_like(x), "mean": torch.zeros(len(x), 1)}

        def launch() -> None:
            outputs["y"].copy_(2 * x)
            outputs["mean"].copy_(x.mean(-1, keepdim=True))

        return PreparedCall(inputs={"x": x}, outputs=outputs, launch=self._captured(launch))


def test_calls_are_ordered_on_a_separate_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller's stream waits, the host does not; later calls do not overwrite earlier outputs."""
    waits: list[str] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream("engine", waits))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream("caller", waits))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    engine = Doubling(Path("double"), ["x"], torch.device("cpu"), capturable=False)
    check(engine, "cpu")
    assert waits == ["engine after caller", "caller after engine"] * 4
    for width in range(10, 11 + GRAPHS):
        engine.run_tensors({"x": torch.ones(1, width)})
    assert waits.count("host after engine") == 4, "three shapes of `check` and one more make room"


class FakeContext:
    """Replaces an execution context, and refuses the named setting."""

    active_optimization_profile = 0

    def __init__(self, refused: str) -> None:
        self._refused = refused

    def create_execution_context(self, strategy: object) -> FakeContext:
        return self

    def set_device_memory(self, memory: int, size: int) -> None:
        pass

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        return self._refused != "profile"

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        return self._refused != name


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        ("profile", "unet refused optimization profile 1"),
        ("sample", r"unet refused sample of \[2, 4, 128\]"),
    ],
)
def test_a_refused_setting_is_an_error(refused: str, message: str) -> None:
    """TensorRT returns False, and would run with the previous setting."""
    engine: Any = object.__new__(TensorRTEngine)
    engine._engine, engine._contexts = FakeContext(refused), None
    engine._file, engine._profiles = Path("unet"), PROFILES
    engine._memory, engine._stream = torch.empty(0), SimpleNamespace(cuda_stream=0)
    with pytest.raises(EngineError, match=message):
        engine._context((("sample", (2, 4, 128)), ("tokens", (2, 16))))


@pytest.mark.parametrize(("capability", "runs"), [((9, 0), False), ((10, 0), False), ((8, 9), True)])
def test_rtx_refuses_data_center_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], runs: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(EngineInfo, "check", lambda engine, version: None)
    message = "(?i)cuda" if runs else "TensorRT-RTX does not support .* data center GPUs"
    with pytest.raises((EngineError, RuntimeError, AssertionError), match=message):
        TensorRTEngine(tmp_path / "unet.plan", TENSORRT_RTX)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("backend", MODULES)
def test_without_a_gpu_tensors_stay_on_the_cpu(backend: str) -> None:
    assert get_backend(backend).device() == torch.device("cpu")


@pytest.mark.gpu
@needs_gpu
def test_onnxruntime_on_a_gpu(tmp_path: Path) -> None:
    engine = get_backend("onnxruntime").load(write(tmp_path / "model.onnx"), device="cuda:0")
    assert isinstance(engine, OnnxRuntimeDeviceEngine)
    check(engine, "cuda:0")
    with torch.cuda.stream(torch.cuda.Stream()):
        check(engine, "cuda:0")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt_rtx"])
def test_tensorrt_on_a_gpu(tmp_path: Path, backend: str) -> None:
    """With more shapes than graphs are kept, every output is still right."""
    if backend == "tensorrt_rtx" and compute_capability() not in TARGETS:
        pytest.skip(f"the engine is for {', '.join(TARGETS)}, and the GPU is an {compute_capability()}")
    try:
        builder = Builder(backend, targets=TARGETS, cache=tmp_path / "cache")
    except EngineError as error:
        pytest.skip(str(error))
    builder.build(write(tmp_path / "model.onnx"), tmp_path / "model.plan", [{"x": ((1, 1), (2, 4), (8, 64))}])
    engine = get_backend(backend).load(tmp_path / "model.plan")
    assert isinstance(engine, TensorRTEngine)
    check(engine, "cuda")
    for width in (*range(1, GRAPHS + 3), 1):
        x = torch.randn(3, width, device="cuda")
        torch.testing.assert_close(engine.run_tensors({"x": x})["y"], 2 * x)
    with pytest.raises(EngineError, match="takes x of"):
        engine.run_tensors({"x": torch.zeros(9, 4, device="cuda")})
