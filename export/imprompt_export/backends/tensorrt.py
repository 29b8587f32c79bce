"""ONNX file -> TensorRT or TensorRT-RTX engine, or an engine whose weights are replaced.

Networks are strongly typed: types are those of the ONNX graph (https://docs.nvidia.com/deeplearning/tensorrt/).
TensorRT builds for the GPU that it runs on. TensorRT-RTX needs none: its engines are finished where they run.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from imprompt_export.backends import Compile, ExportBackend, Tell
from imprompt_export.errors import one_line
from imprompt_serving.backends import EngineError
from imprompt_serving.backends import tensorrt as serving
from imprompt_serving.backends.files import write_whole
from imprompt_serving.backends.tensorrt import EngineInfo, EngineTensor
from imprompt_serving.specs import Bundle

if TYPE_CHECKING:
    from imprompt_export.bundle import EngineSection
    from imprompt_export.graphs import Axes, Graph
    from imprompt_export.profiles import Profile

_RECIPE = 2
"""How engines are made: another number where it changes, so that those that were kept are not taken any more."""


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

    def max_batch_size(self, graph: Graph, bundle: Bundle) -> int:
        from imprompt_export.profiles import batch

        return batch(graph, bundle).max


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
        self._cache = cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "imprompt", "engines")
        self._donors = dict(_engines(refit_from)) if refit_from else {}

    def _known(self, targets: Sequence[str]) -> tuple[str, ...]:
        known = [name for name in self._package.ComputeCapability.__members__ if name.startswith("SM")]
        if not targets or not set(targets) <= set(known):
            raise EngineError(f"engine.targets: {', '.join(targets)}; {self._backend} builds for {', '.join(known)}")
        return tuple(targets)

    def build(self, source: Path, engine: Path, profiles: Sequence[Profile], report: Tell = lambda _: None) -> None:
        """Compile `source`, whose inputs have the ranges of `profiles`, into the file `engine`.

        An engine of the same model, settings, version and GPU that was built before is taken as it is.

        Raises:
            EngineError: the graph was refused, or there is no such engine to take the other weights of.
        """
        info = self._info(source, profiles)
        kept = self._cache / f"{_digest(info)}.plan"
        described = _kept_info(kept) if kept.exists() else None
        if described is None:
            self._cache.mkdir(parents=True, exist_ok=True)
            content, described = self._refitted(source, info) or self._built(source, info, profiles, report)
            described.save(kept)
            write_whole(kept, content)  # last: where it is, all is there
        engine.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(kept, engine)
        described.save(engine)

    def _info(self, source: Path, profiles: Sequence[Profile]) -> EngineInfo:
        return EngineInfo(
            backend=self._backend,
            version=self._package.__version__,
            target=self._target,
            model=_file_hash(source),
            architecture=_architecture(source),
            settings=_digest([_RECIPE, profiles, self._refit]),
            refit=self._refit,
        )

    def _built(
        self, source: Path, info: EngineInfo, profiles: Sequence[Profile], report: Tell
    ) -> tuple[Any, EngineInfo]:
        trt = self._package
        builder = trt.Builder(self._logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, self._logger)
        if not parser.parse_from_file(str(source)):
            raise EngineError(f"{self._backend} cannot read {source.stem}: {_errors(parser)}")
        config = self._config(builder)
        made = [_profile(builder, network, profile) for profile in profiles]
        for profile in made:
            config.add_optimization_profile(profile)
        timings = self._cache / f"{_digest([trt.__version__, self._target])}.timings"
        if not self._targets:  # TensorRT-RTX times nothing before it runs
            known = timings.read_bytes() if timings.exists() else b""
            cache = config.create_timing_cache(known) or config.create_timing_cache(b"")  # None if it is damaged
            config.set_timing_cache(cache, False)
        monitor = config.progress_monitor = _monitor(trt, report)
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            hint = " (engine.refit needs the GPU to be there)" if self._refit and self._targets else ""
            raise EngineError(f"{self._backend} cannot build {source.stem}{hint}; see its messages above")
        if not self._targets:
            write_whole(timings, bytes(config.get_timing_cache().serialize()))
        del monitor  # must outlive the build
        return engine, _described(info, network, made)

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
                config.set_compute_capability(trt.ComputeCapability.__members__[target], index)
        return config

    def _refitted(self, source: Path, info: EngineInfo) -> tuple[Any, EngineInfo] | None:
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
        return _serialized(trt, engine), msgspec.structs.replace(donor, model=info.model)


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
        made.set_shape(name, *profile[name])
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
