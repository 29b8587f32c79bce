"""TensorRT and TensorRT-RTX: compile ONNX files to engines, or replace the weights of an existing engine.

Networks are strongly typed: they compute in the types of the ONNX graph
(https://docs.nvidia.com/deeplearning/tensorrt/). TensorRT builds for the GPU that it runs on. TensorRT-RTX needs no
GPU to build: its engines are completed on the GPU that runs them.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from imprompt_export.backends import CompileOnnx, ExportBackend
from imprompt_export.errors import one_line
from imprompt_export.stages import StatusCallback
from imprompt_serving.backends import EngineError
from imprompt_serving.backends import tensorrt as serving
from imprompt_serving.backends.files import write_atomically
from imprompt_serving.backends.tensorrt import EngineInfo, EngineTensor
from imprompt_serving.specs import Bundle

if TYPE_CHECKING:
    from imprompt_export.graphs import Axes, Graph
    from imprompt_export.profiles import Profile
    from imprompt_export.sections import EngineSection

logger = logging.getLogger(__name__)

_RECIPE = 3
"""Version of the way engines are built; increase it whenever that changes, so that cached engines are not reused."""
_FUSED = re.compile(r"(?<![a-z])f?mha(?![a-z])", re.IGNORECASE)
"""Matches names of fused attention layers, such as `_gemm_mha_v2_myl3_6` (NVIDIA/TensorRT issue 3243)."""
_PROFILE = re.compile(r"\[profile (\d+)\]$")
"""Matches the end of a layer's name in every profile but the first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRT(ExportBackend):
    refittable: bool = True

    def check_installed(self, engine: EngineSection) -> None:
        serving.BACKENDS[self.name].package()

    def onnx_compiler(self, engine: EngineSection, refit_from: Path | None) -> CompileOnnx:
        from imprompt_export.profiles import profiles

        builder = Builder(self.name, targets=engine.targets, refit=engine.refit, refit_from=refit_from)

        def build(graph: Graph, source: Path, bundle: Bundle, show_status: StatusCallback) -> Path:
            file = source.parent / "engine" / f"{graph.name}.plan"
            builder.build(source, file, profiles(graph, bundle), show_status)
            return file

        return build

    def comparison_backend(self, engine: EngineSection) -> str | None:
        """Return this backend, or ONNX Runtime if no GPU here can run the engines.

        ONNX Runtime then runs the ONNX files in the same types on the CPU. It has no bf16 there, hence None.
        """
        import torch

        only_for = engine.targets if serving.BACKENDS[self.name].finishes_on_gpu else None
        if torch.cuda.is_available() and (only_for is None or compute_capability() in only_for):
            return self.name
        return "onnxruntime" if engine.precision != "bf16" else None

    def check_axes(self, graph: Graph, bundle: Bundle) -> tuple[Axes, ...]:
        from imprompt_export.profiles import check_axes

        return check_axes(graph, bundle)


class Builder:
    """Builds engines for one backend and caches them between exports.

    Args:
        backend: `tensorrt` or `tensorrt_rtx`.
        targets: compute capabilities for TensorRT-RTX, such as `SM89`.
        refit: whether the weights of the engines can be replaced later.
        refit_from: a folder of engines, such as a repository; an engine in it that only differs in its weights gets the
            new weights instead of being built again.
        cache: the folder in which engines and kernel timings are cached.
    """

    def __init__(
        self,
        backend: str,
        *,
        targets: Sequence[str] = (),
        refit: bool = False,
        refit_from: Path | None = None,
        cache: Path | None = None,
    ) -> None:
        served = serving.BACKENDS[backend]
        self._backend, self._refit = backend, refit or refit_from is not None
        self._package = served.package()
        self._logger = self._package.Logger(self._package.Logger.ERROR)
        self._targets = self._checked_targets(targets) if served.finishes_on_gpu else ()
        self._target = "+".join(self._targets) or gpu_name()
        self._platform = "" if self._targets else platform()
        self._cache = cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "imprompt", "engines")
        self._donors = dict(_engines(refit_from)) if refit_from else {}

    def _checked_targets(self, targets: Sequence[str]) -> tuple[str, ...]:
        for name in targets:
            serving.refuse_data_center_gpu(name)
        known = [name for name in self._package.ComputeCapability.__members__ if name.startswith("SM")]
        if not targets or not set(targets) <= set(known):
            allowed = ", ".join(f"{name} ({serving.capability(name)})" for name in known)
            requested = ", ".join(targets) or "none"
            raise EngineError(f"engine.targets: must be among {allowed} for {self._backend}, got {requested}")
        return tuple(targets)

    def build(
        self, source: Path, engine: Path, profiles: Sequence[Profile], show_status: StatusCallback = lambda _: None
    ) -> None:
        """Compile the ONNX file `source` into the file `engine`, for the input ranges in `profiles`.

        An engine that an earlier export built from the same model, settings, versions, and GPU is reused.

        Raises:
            EngineError: TensorRT rejects the graph, or `refit_from` has no engine that can take its weights.
        """
        info = self._info(source, profiles)
        kept = self._cache / f"{_digest(info)}.plan"
        described = _load_info(kept) if kept.exists() else None
        if described is None:
            self._cache.mkdir(parents=True, exist_ok=True)
            build = self._refitted(source, info) or self._build_engine(source, info, profiles, show_status)
            described = build.info
            described.save(kept)
            write_atomically(kept, build.content)  # last: where this file exists, the others do too
            self._keep_timings(build.config)
        if described.fused_attention is not None:
            _report_attention(source.stem, described, show_status)
        engine.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(kept, engine)
        described.save(engine)

    def _info(self, source: Path, profiles: Sequence[Profile]) -> EngineInfo:
        return EngineInfo(
            backend=self._backend,
            version=self._package.__version__,
            target=self._target,
            platform=self._platform,
            model=_file_hash(source),
            architecture=_architecture(source),
            settings=_digest([_RECIPE, profiles, self._refit]),
            refit=self._refit,
        )

    def _build_engine(
        self, source: Path, info: EngineInfo, profiles: Sequence[Profile], show_status: StatusCallback
    ) -> _Build:
        trt = self._package
        builder = trt.Builder(self._logger)
        network = builder.create_network(_network_flags(trt))
        parser = trt.OnnxParser(network, self._logger)
        if not parser.parse_from_file(str(source)):
            raise EngineError(f"{self._backend} cannot read {source.stem}: {_errors(parser)}")
        config = self._config(builder)
        made = [_profile(builder, network, profile) for profile in profiles]
        for index, profile in enumerate(made):
            added = config.add_optimization_profile(profile)
            _require(added == index, f"optimization profile {index} of {source.stem}")
        if not self._targets:  # TensorRT-RTX only times kernels where it runs
            self._set_timings(config)
        monitor = config.progress_monitor = _monitor(trt, show_status)
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            hint = " (engine.refit needs a GPU at the export)" if self._refit and self._targets else ""
            raise EngineError(f"{self._backend} cannot build {source.stem}{hint}; see its messages above")
        del monitor  # must outlive the build
        described = _with_tensors(info, network, made)
        if not self._targets:
            fused = fused_attention(trt, trt.Runtime(self._logger).deserialize_cuda_engine(engine))
            described = msgspec.structs.replace(
                described, attention=_attention_layers(trt, network), fused_attention=fused
            )
        return _Build(content=engine, info=described, config=config)

    @property
    def _timings(self) -> Path:
        return self._cache / f"{_digest([self._package.__version__, self._target, self._platform])}.timings"

    def _set_timings(self, config: Any) -> None:
        """Load the kernel timings of earlier builds, or none if they are damaged or belong to another GPU."""
        kept = config.create_timing_cache(self._timings.read_bytes()) if self._timings.exists() else None
        if kept is None or not config.set_timing_cache(kept, False):
            _require(config.set_timing_cache(config.create_timing_cache(b""), False), "an empty timing cache")

    def _keep_timings(self, config: Any) -> None:
        """Save the kernel timings of a build for the next one; a failure must not lose the engine."""
        cache = None if config is None or self._targets else config.get_timing_cache()
        content = cache and cache.serialize()
        if content is None:
            return
        try:
            write_atomically(self._timings, bytes(content))
        except OSError as error:
            logger.warning("cannot save the kernel timings of this build: %s", error)

    def _config(self, builder: Any) -> Any:
        """Return the settings of a build, without its profiles."""
        trt = self._package
        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)  # its 10-bit mantissa is less than float32 promises
        if self._refit:
            config.set_flag(trt.BuilderFlag.REFIT)
        if self._targets:
            config.num_compute_capabilities = len(self._targets)
            for index, target in enumerate(self._targets):
                taken = config.set_compute_capability(trt.ComputeCapability.__members__[target], index)
                _require(taken, f"engine.targets: {target}")
        return config

    def _refitted(self, source: Path, info: EngineInfo) -> _Build | None:
        """Return a donor's engine with the weights of `source`; None if there are no donors."""
        if not self._donors:
            return None
        wanted = _refit_key(info)
        if wanted not in self._donors:
            raise EngineError(
                f"--refit-from: no engine there can take the weights of {source.stem}: it needs the same architecture "
                f"and [shapes], engine.refit = true, and {info.backend} {info.version} for {info.target}"
            )
        trt = self._package
        engine = trt.Runtime(self._logger).deserialize_cuda_engine(self._donors[wanted].read_bytes())
        if engine is None:
            raise EngineError(f"--refit-from: {self._donors[wanted]} cannot be loaded; a refit needs the GPU")
        refit(trt, self._logger, engine, source)
        donor = EngineInfo.load(self._donors[wanted])
        described = msgspec.structs.replace(donor, model=info.model, platform=info.platform)
        return _Build(content=_serialized(trt, engine), info=described, config=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Build:
    """A serialized engine, its description, and its build settings with the kernel timings (None after a refit)."""

    content: Any
    info: EngineInfo
    config: Any


def _require(accepted: bool, what: str) -> None:
    """Raise if TensorRT rejected a setting, which it reports as a return value, not as an exception."""
    if not accepted:
        raise EngineError(f"TensorRT rejected {what}; see its message above")


def _network_flags(trt: Any) -> int:
    """Return the flags of a strongly typed network; TensorRT 11 and TensorRT-RTX have no other kind."""
    if trt.__version__.split(".")[0] != "10":
        return 0
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _attention_layers(trt: Any, network: Any) -> int:
    """Count the attention layers of a network by their softmaxes."""
    layers = (network.get_layer(index) for index in range(network.num_layers))
    return sum(layer.type == trt.LayerType.SOFTMAX for layer in layers)


def fused_attention(trt: Any, engine: Any) -> int | None:
    """Count the attention layers that became one kernel, in the profile with the fewest.

    None if the engine cannot be inspected.
    """
    if engine is None:
        return None
    inspector = engine.create_engine_inspector()
    layers = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))["Layers"]
    counts: Counter[str] = Counter()
    for layer in layers:
        name = layer["Name"] if isinstance(layer, dict) else layer  # depends on how verbose the build was
        profile = _PROFILE.search(name)
        counts[profile[1] if profile else "0"] += bool(_FUSED.search(name))
    return min(counts.values(), default=0)


def _report_attention(name: str, info: EngineInfo, show_status: StatusCallback) -> None:
    fused = info.fused_attention or 0
    show_status(f"{min(fused, info.attention)} of {info.attention} attention layers are fused")
    if fused < info.attention:
        logger.warning(
            "%s: TensorRT fused %d of %d attention layers; the others store their scores, which costs time and memory",
            name,
            fused,
            info.attention,
        )


def platform() -> str:
    """Return the versions of the driver and of CUDA, which determine the kernels that an engine can have."""
    import torch

    return f"driver {driver_version()}, CUDA {torch.version.cuda}"


def driver_version() -> str:
    """Return the version of NVIDIA's driver, such as `580.95.05`.

    Raises:
        EngineError: NVML is missing or does not respond.
    """
    answer = ctypes.create_string_buffer(80)  # NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as error:
        raise EngineError(f"cannot read the version of NVIDIA's driver: {error}") from None
    if library.nvmlInit_v2() != 0 or library.nvmlSystemGetDriverVersion(answer, len(answer)) != 0:
        raise EngineError("cannot read the version of NVIDIA's driver: NVML does not respond")
    return answer.value.decode()


def gpu_name() -> str:
    """Return the name and compute capability of the first GPU.

    Raises:
        EngineError: this machine has no GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise EngineError("TensorRT builds engines on the GPU that will run them, but this machine has none")
    return f"{torch.cuda.get_device_name()} {compute_capability()}"


def compute_capability() -> str:
    """Return the compute capability of the first GPU in the form of `engine.targets`, such as `SM89`."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"SM{major}{minor}"


def refit(trt: Any, logger: Any, engine: Any, source: Path) -> None:
    """Replace the weights of `engine` by those of the ONNX file `source`.

    Raises:
        EngineError: weights are missing, or have other names or shapes.
    """
    refitter = trt.Refitter(engine, logger)
    # The parser only prepares the weights, and must stay alive until the refitter has copied them.
    parser = trt.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(str(source)):
        raise EngineError(f"--refit-from: {source.stem}: {_errors(parser)}")
    missing = refitter.get_missing_weights()
    if missing:
        raise EngineError(
            f"--refit-from: {source.stem} lacks {len(missing)} weights of the engine, such as {missing[0]}"
        )
    if not refitter.refit_cuda_engine():
        raise EngineError(f"--refit-from: the engine rejected the weights of {source.stem}; see the message above")


def _serialized(trt: Any, engine: Any) -> Any:
    """Serialize an engine together with its weights and its ability to be refitted."""
    config = engine.create_serialization_config()
    config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
    return engine.serialize_with_config(config)


def _profile(builder: Any, network: Any, profile: Profile) -> Any:
    """Create an optimization profile for the inputs that `network` has; the exporter drops unused ones."""
    made = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        name = network.get_input(index).name
        made.set_shape(name, *profile[name])  # returns nothing: an error only shows when the profile is added
    return made


def _with_tensors(info: EngineInfo, network: Any, profiles: Sequence[Any]) -> EngineInfo:
    """Return `info` with the inputs and outputs of `network` added."""
    inputs, outputs = {}, {}
    for tensor in (network.get_input(index) for index in range(network.num_inputs)):
        ranges = tuple(tuple(tuple(shape) for shape in profile.get_shape(tensor.name)) for profile in profiles)
        inputs[tensor.name] = EngineTensor(dtype=tensor.dtype.name, shape=tuple(tensor.shape), profiles=ranges)
    for tensor in (network.get_output(index) for index in range(network.num_outputs)):
        outputs[tensor.name] = EngineTensor(dtype=tensor.dtype.name, shape=tuple(tensor.shape))
    return msgspec.structs.replace(info, inputs=inputs, outputs=outputs)


def _monitor(trt: Any, show_status: StatusCallback) -> Any:
    """Return a progress monitor that shows each phase of the build as a line."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            show_status(f"{phase_name} {step + 1}/{self._steps.get(phase_name, step + 1)}")
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()


def _engines(folder: Path) -> list[tuple[str, Path]]:
    """List the engines under `folder` that can be refitted, each with its `_refit_key`."""
    found = []
    for file in sorted(folder.rglob("*.plan")):
        info = _load_info(file)
        if info is not None and info.refit:
            found.append((_refit_key(info), file))
    if not found:
        raise EngineError(f"--refit-from: no engine in {folder} was built with engine.refit = true")
    return found


def _load_info(engine: Path) -> EngineInfo | None:
    """Load the description of `engine`; None if it is missing or damaged."""
    try:
        return EngineInfo.load(engine)
    except (OSError, msgspec.DecodeError):
        return None


def _refit_key(info: EngineInfo) -> str:
    """Hash what two engines must have in common to exchange their weights."""
    return _digest([info.backend, info.version, info.target, info.architecture, info.settings])


def _architecture(source: Path) -> str:
    """Hash the graph in `source` without the values of its weights."""
    import onnx

    model = onnx.load(source, load_external_data=False)
    for weight in model.graph.initializer:
        for field in ("raw_data", "external_data", "float_data", "int32_data"):
            weight.ClearField(field)
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def _file_hash(source: Path) -> str:
    """Hash an ONNX file and its external data."""
    digest = hashlib.sha256()
    for file in sorted(source.parent.glob(f"{source.name}*")):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(msgspec.to_builtins(value), sort_keys=True).encode()).hexdigest()[:32]


def _errors(parser: Any) -> str:
    reasons = [str(parser.get_error(index)) for index in range(parser.num_errors)]
    return one_line("; ".join(reasons), 600) or "no reason given"


BACKENDS = {
    "tensorrt": TensorRT(name="tensorrt", distributions=("tensorrt-cu13",)),
    "tensorrt_rtx": TensorRT(name="tensorrt_rtx", distributions=("tensorrt-rtx-cu13-bindings",)),
}
