"""ONNX file -> TensorRT or TensorRT-RTX engine, or an engine whose weights are replaced.

Networks are strongly typed: types are those of the ONNX graph (https://docs.nvidia.com/deeplearning/tensorrt/).
TensorRT builds for the GPU that it runs on. TensorRT-RTX needs none: its engines are finished where they run.
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

from imprompt_export.backends import Compile, ExportBackend, Tell
from imprompt_export.errors import one_line
from imprompt_serving.backends import EngineError
from imprompt_serving.backends import tensorrt as serving
from imprompt_serving.backends.files import write_atomically
from imprompt_serving.backends.tensorrt import EngineInfo, EngineTensor
from imprompt_serving.specs import Bundle

if TYPE_CHECKING:
    from imprompt_export.bundle import EngineSection
    from imprompt_export.graphs import Axes, Graph
    from imprompt_export.profiles import Profile

logger = logging.getLogger(__name__)

_RECIPE = 3
"""How engines are made: another number where it changes, so that those that were kept are not taken any more."""
_FUSED = re.compile(r"(?<![a-z])f?mha(?![a-z])", re.IGNORECASE)
"""In names of layers, such as `_gemm_mha_v2_myl3_6`: attention in one kernel (NVIDIA/TensorRT issue 3243)."""
_PROFILE = re.compile(r"\[profile (\d+)\]$")
"""What ends the name of a layer of any profile but the first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRT(ExportBackend):
    refittable: bool = True

    def check_installed(self, engine: EngineSection) -> None:
        serving.BACKENDS[self.name].package()

    def compiler(self, engine: EngineSection, refit_from: Path | None) -> Compile:
        from imprompt_export.profiles import profiles

        builder = Builder(self.name, targets=engine.targets, refit=engine.refit, refit_from=refit_from)

        def build(graph: Graph, source: Path, bundle: Bundle, tell: Tell) -> Path:
            file = source.parent / "engine" / f"{graph.name}.plan"
            builder.build(source, file, profiles(graph, bundle), tell)
            return file

        return build

    def runner(self, engine: EngineSection) -> str | None:
        """Engines that no GPU here can run are compared by their ONNX files, in the same types, on the CPU.

        ONNX Runtime has no bf16 there.
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
    """Builds engines for one backend, and keeps what it built.

    Args:
        targets: compute capabilities for TensorRT-RTX, such as `SM89`.
        refit: whether the weights of the engines can be replaced later.
        refit_from: a folder, such as a repository; an engine in it that differs in its weights alone is given the new
            weights instead of being built again.
        cache: where engines and timings are kept between exports.
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
        self._targets = self._known(targets) if served.finishes_on_gpu else ()
        self._target = "+".join(self._targets) or gpu_name()
        self._platform = "" if self._targets else platform()
        self._cache = cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "imprompt", "engines")
        self._donors = dict(_engines(refit_from)) if refit_from else {}

    def _known(self, targets: Sequence[str]) -> tuple[str, ...]:
        for name in targets:
            serving.refuse_data_center_gpu(name)
        known = [name for name in self._package.ComputeCapability.__members__ if name.startswith("SM")]
        if not targets or not set(targets) <= set(known):
            allowed = ", ".join(f"{name} ({serving.capability(name)})" for name in known)
            asked = ", ".join(targets) or "none"
            raise EngineError(f"engine.targets: {asked}; {self._backend} builds for {allowed}")
        return tuple(targets)

    def build(self, source: Path, engine: Path, profiles: Sequence[Profile], report: Tell = lambda _: None) -> None:
        """Compile `source`, whose inputs have the ranges of `profiles`, into the file `engine`.

        An engine of the same model, settings, versions and GPU that was built before is taken as it is.

        Raises:
            EngineError: the graph was refused, or there is no such engine to take the other weights of.
        """
        info = self._info(source, profiles)
        kept = self._cache / f"{_digest(info)}.plan"
        described = _kept_info(kept) if kept.exists() else None
        if described is None:
            self._cache.mkdir(parents=True, exist_ok=True)
            build = self._refitted(source, info) or self._built(source, info, profiles, report)
            described = build.info
            described.save(kept)
            write_atomically(kept, build.content)  # last: where it is, all is there
            self._keep_timings(build.config)
        if described.fused_attention is not None:
            _tell_of_attention(source.stem, described, report)
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

    def _built(self, source: Path, info: EngineInfo, profiles: Sequence[Profile], report: Tell) -> _Build:
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
            _check(added == index, f"optimization profile {index} of {source.stem}")
        if not self._targets:  # TensorRT-RTX times nothing before it runs
            self._set_timings(config)
        monitor = config.progress_monitor = _monitor(trt, report)
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            hint = " (engine.refit needs the GPU to be there)" if self._refit and self._targets else ""
            raise EngineError(f"{self._backend} cannot build {source.stem}{hint}; see its messages above")
        del monitor  # must outlive the build
        described = _described(info, network, made)
        if not self._targets:
            fused = fused_attention(trt, trt.Runtime(self._logger).deserialize_cuda_engine(engine))
            described = msgspec.structs.replace(described, attention=_attention(trt, network), fused_attention=fused)
        return _Build(content=engine, info=described, config=config)

    @property
    def _timings(self) -> Path:
        return self._cache / f"{_digest([self._package.__version__, self._target, self._platform])}.timings"

    def _set_timings(self, config: Any) -> None:
        """Give a build the timings of earlier ones; none of them if they are damaged, or not of this GPU."""
        kept = config.create_timing_cache(self._timings.read_bytes()) if self._timings.exists() else None
        if kept is None or not config.set_timing_cache(kept, False):
            _check(config.set_timing_cache(config.create_timing_cache(b""), False), "an empty timing cache")

    def _keep_timings(self, config: Any) -> None:
        """Keep the timings of a build for the next one; an engine that was built is not lost if that fails."""
        cache = None if config is None or self._targets else config.get_timing_cache()
        content = cache and cache.serialize()
        if content is None:
            return
        try:
            write_atomically(self._timings, bytes(content))
        except OSError as error:
            logger.warning("the timings of this build are not kept: %s", error)

    def _config(self, builder: Any) -> Any:
        """Settings of a build, without its profiles."""
        trt = self._package
        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)  # whose 10 bits are not what float32 promises
        if self._refit:
            config.set_flag(trt.BuilderFlag.REFIT)
        if self._targets:
            config.num_compute_capabilities = len(self._targets)
            for index, target in enumerate(self._targets):
                taken = config.set_compute_capability(trt.ComputeCapability.__members__[target], index)
                _check(taken, f"engine.targets: {target}")
        return config

    def _refitted(self, source: Path, info: EngineInfo) -> _Build | None:
        """A donor's engine with the weights of `source`; None without donors."""
        if not self._donors:
            return None
        wanted = _kind(info)
        if wanted not in self._donors:
            raise EngineError(
                f"--refit-from: no engine there has the architecture of {source.stem}, the same [shapes], "
                f"was made to take weights (engine.refit), and by {info.backend} {info.version} for {info.target}"
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
    """An engine, what it says of itself, and the settings that have its timings; None of a refit, which times none."""

    content: Any
    info: EngineInfo
    config: Any


def _check(done: bool, what: str) -> None:
    """Raise for a setting that TensorRT refused: it says so by its answer, not by an exception."""
    if not done:
        raise EngineError(f"TensorRT does not take {what}; see its message above")


def _network_flags(trt: Any) -> int:
    """Flags of a strongly typed network; TensorRT 11 and TensorRT-RTX have no other kind."""
    if trt.__version__.split(".")[0] != "10":
        return 0
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _attention(trt: Any, network: Any) -> int:
    """Attention layers of a network, by their softmaxes."""
    layers = (network.get_layer(index) for index in range(network.num_layers))
    return sum(layer.type == trt.LayerType.SOFTMAX for layer in layers)


def fused_attention(trt: Any, engine: Any) -> int | None:
    """Attention layers that are one kernel, in the profile that has fewest; None if the engine cannot be inspected."""
    if engine is None:
        return None
    inspector = engine.create_engine_inspector()
    layers = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))["Layers"]
    counts: Counter[str] = Counter()
    for layer in layers:
        name = layer["Name"] if isinstance(layer, dict) else layer  # by how much the builder was told to keep
        profile = _PROFILE.search(name)
        counts[profile[1] if profile else "0"] += bool(_FUSED.search(name))
    return min(counts.values(), default=0)


def _tell_of_attention(name: str, info: EngineInfo, report: Tell) -> None:
    fused = info.fused_attention or 0
    report(f"{min(fused, info.attention)} of {info.attention} attention layers are fused")
    if fused < info.attention:
        logger.warning(
            "%s: TensorRT fused %d of %d attention layers; the others store their scores, which takes time and memory",
            name,
            fused,
            info.attention,
        )


def platform() -> str:
    """Versions of the driver and of CUDA, which decide what kernels an engine can have."""
    import torch

    return f"driver {driver_version()}, CUDA {torch.version.cuda}"


def driver_version() -> str:
    """That of NVIDIA's driver, such as `580.95.05`.

    Raises:
        EngineError: the driver does not tell.
    """
    answer = ctypes.create_string_buffer(80)  # NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as error:
        raise EngineError(f"the version of NVIDIA's driver is not to be had: {error}") from None
    if library.nvmlInit_v2() != 0 or library.nvmlSystemGetDriverVersion(answer, len(answer)) != 0:
        raise EngineError("the version of NVIDIA's driver is not to be had: NVML does not answer")
    return answer.value.decode()


def gpu_name() -> str:
    """Name and compute capability of the first GPU.

    Raises:
        EngineError: there is none.
    """
    import torch

    if not torch.cuda.is_available():
        raise EngineError("TensorRT builds engines on the GPU that they are for, and there is none here")
    return f"{torch.cuda.get_device_name()} {compute_capability()}"


def compute_capability() -> str:
    """That of the first GPU, as `engine.targets` has it: `SM89`, say."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"SM{major}{minor}"


def refit(trt: Any, logger: Any, engine: Any, source: Path) -> None:
    """Give `engine` the weights of `source`: the parser only lays them out, the refitter puts them in.

    Raises:
        EngineError: weights are of other names or shapes, or missing.
    """
    refitter = trt.Refitter(engine, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)  # holds the weights until they are in
    if not parser.refit_from_file(str(source)):
        raise EngineError(f"--refit-from: {source.stem}: {_errors(parser)}")
    missing = refitter.get_missing_weights()
    if missing:
        raise EngineError(
            f"--refit-from: {source.stem} lacks {len(missing)} weights of the engine, such as {missing[0]}"
        )
    if not refitter.refit_cuda_engine():
        raise EngineError(f"--refit-from: the engine does not take the weights of {source.stem}; see the message above")


def _serialized(trt: Any, engine: Any) -> Any:
    """All of an engine: its weights, and that it takes others."""
    config = engine.create_serialization_config()
    config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
    return engine.serialize_with_config(config)


def _profile(builder: Any, network: Any, profile: Profile) -> Any:
    """`profile` for the inputs that the graph has; the exporter drops those that it does not use."""
    made = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        name = network.get_input(index).name
        made.set_shape(name, *profile[name])  # has no answer: what is wrong shows when the profile is added
    return made


def _described(info: EngineInfo, network: Any, profiles: Sequence[Any]) -> EngineInfo:
    """`info` with the inputs and outputs of `network`."""
    inputs, outputs = {}, {}
    for tensor in (network.get_input(index) for index in range(network.num_inputs)):
        ranges = tuple(tuple(tuple(shape) for shape in profile.get_shape(tensor.name)) for profile in profiles)
        inputs[tensor.name] = EngineTensor(dtype=tensor.dtype.name, shape=tuple(tensor.shape), profiles=ranges)
    for tensor in (network.get_output(index) for index in range(network.num_outputs)):
        outputs[tensor.name] = EngineTensor(dtype=tensor.dtype.name, shape=tuple(tensor.shape))
    return msgspec.structs.replace(info, inputs=inputs, outputs=outputs)


def _monitor(trt: Any, report: Tell) -> Any:
    """The builder's phases as lines."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            report(f"{phase_name} {step + 1}/{self._steps.get(phase_name, step + 1)}")
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()


def _engines(folder: Path) -> list[tuple[str, Path]]:
    """Engines under `folder` that take weights, by what they have in common with those that can give them."""
    found = []
    for file in sorted(folder.rglob("*.plan")):
        info = _kept_info(file)
        if info is not None and info.refit:
            found.append((_kind(info), file))
    if not found:
        raise EngineError(f"--refit-from: no engine in {folder} was made to take weights (engine.refit = true)")
    return found


def _kept_info(engine: Path) -> EngineInfo | None:
    """What `engine` says of itself; None where that is missing or damaged."""
    try:
        return EngineInfo.load(engine)
    except (OSError, msgspec.DecodeError):
        return None


def _kind(info: EngineInfo) -> str:
    """What engines must agree in to take each other's weights."""
    return _digest([info.backend, info.version, info.target, info.architecture, info.settings])


def _architecture(source: Path) -> str:
    """A hash of the graph in `source` without the values of its weights."""
    import onnx

    model = onnx.load(source, load_external_data=False)
    for weight in model.graph.initializer:
        for field in ("raw_data", "external_data", "float_data", "int32_data"):
            weight.ClearField(field)
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def _file_hash(source: Path) -> str:
    """A hash of an ONNX file and its external data."""
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
