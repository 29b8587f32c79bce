"""AOTInductor: compile `torch.export` programs to packages of machine code; the weights are in one file next to them.

https://docs.pytorch.org/docs/stable/torch.compiler_aot_inductor.html
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imprompt_export.backends import BuiltEngine, ExportBackend, StartBuild
from imprompt_export.errors import BundleError, one_line
from imprompt_export.stages import Stages, StatusCallback
from imprompt_serving.backends import EngineError
from imprompt_serving.backends.inductor import LORA_DOWN, LORA_UP, WEIGHTS, EngineInfo, Package, lora_file, target
from imprompt_serving.specs import Bundle, Shapes

if TYPE_CHECKING:
    import torch

    from imprompt_export.checkpoints import Checkpoints
    from imprompt_export.graphs import Axes, Graph
    from imprompt_export.quality import Quality
    from imprompt_export.sections import EngineSection

_FP8_CAPABILITY = (8, 9)
"""Compute capability of the first GPUs whose tensor cores compute in fp8."""
_RECIPE = 1
"""Version of the way packages are built; increase it whenever that changes, so that cached packages are not reused."""
_OPTIONS: dict[str, Any] = {
    "aot_inductor.package_constants_in_so": False,
    # Otherwise small constants would become literals in the code, and others would be folded into it.
    "always_keep_tensor_constants": True,
    # The file that calls the kernels is large: g++ takes minutes to optimize it, without any gain.
    "aot_inductor.compile_wrapper_opt_level": "O1",
    "aot_inductor.enable_line_tables": False,
    # Only use the instructions that `target` names, even if this CPU has more.
    "cpp.march": "",
}
_WORKER_BYTES = 3 << 30
"""Memory to build one package: torch used 1 GiB for a small UNet, and g++ takes about as much on top."""
_WORKER_GPU_BYTES = 8 << 30
"""GPU memory to build one package: a worker allocates the weights, 5 GB for SDXL's UNet in half precision."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inductor(ExportBackend):
    def check_installed(self, engine: EngineSection) -> None:
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise BundleError(
                f'engine.backend = "{self.name}" compiles C++ during the export, but {compiler} is not installed: '
                "install g++, or name another compiler in the variable CXX"
            )
        if engine.precision == "fp8" and _on_gpu() and _compute_capability() < _FP8_CAPABILITY:
            raise BundleError(
                'engine.precision = "fp8" needs a GPU of compute capability 8.9 or newer; this one has {}.{}'.format(
                    *_compute_capability()
                )
            )

    @contextmanager
    def builder(self, engine: EngineSection, refit_from: Path | None) -> Iterator[StartBuild]:
        with started_workers() as workers:
            yield Packager(engine.precision, workers, threads=engine.threads, exact=_on_gpu()).start

    def is_exported(self, engine: EngineSection, graph: Graph) -> bool:
        """Return False for fp8, whose engines are compared once more at the end, with the runs of a calibration."""
        return engine.precision != "fp8"

    def sizes(self, shapes: Shapes) -> tuple[tuple[int, int], ...]:
        from imprompt_export.profiles import picture_sizes

        return picture_sizes(shapes) if _on_gpu() else ()

    def check_axes(self, graph: Graph, bundle: Bundle) -> tuple[Axes, ...]:
        """Return the sizes at which to compare.

        On the CPU these are the graph's own and a single row, which packages are not traced with; on a GPU they are the
        sizes that packages are built for.
        """
        if not _on_gpu():
            return (*graph.checks, graph.checks[0] | ({"batch": 1} if "batch" in graph.checks[0] else {}))
        from imprompt_export.profiles import exact_axes

        return tuple(graph.checks[-1] | axes for axes in exact_axes(graph, bundle))

    def calibrate(
        self,
        engine: EngineSection,
        bundle: Bundle,
        checkpoints: Checkpoints,
        graphs: list[Graph],
        show_status: StatusCallback,
    ) -> list[Graph]:
        """Measure the ranges of fp8 if that is the precision."""
        if engine.precision != "fp8":
            return graphs
        from imprompt_export.fp8 import calibrate

        show_status("calibrating fp8")
        return calibrate(bundle, checkpoints, graphs)

    def finish(
        self,
        engine: EngineSection,
        bundle: Bundle,
        checkpoints: Checkpoints,
        graphs: Mapping[str, Graph],
        files: Mapping[str, Path],
        stages: Stages,
    ) -> tuple[Mapping[str, Path], list[Quality]]:
        """Check the quality of the engines if the precision is fp8."""
        if engine.precision != "fp8":
            return files, []
        from imprompt_export.fp8 import measure_quality
        from imprompt_export.quality import check_quality

        with stages.time("comparing fp8 with fp32"):
            quality = measure_quality(bundle, checkpoints, graphs, files, engine.min_snr_db)
        check_quality(quality)
        return files, quality


def _compute_capability() -> tuple[int, int]:
    """Return the compute capability of this machine's GPU."""
    import torch

    return torch.cuda.get_device_capability()


def _on_gpu() -> bool:
    """Return whether packages are built for this machine's GPU."""
    import torch

    return torch.cuda.is_available()


@contextmanager
def started_workers() -> Iterator[ProcessPoolExecutor]:
    """Start processes that build packages. At the end, builds that have not started are cancelled."""
    workers = ProcessPoolExecutor(_worker_count(on_gpu=_on_gpu()), get_context("spawn"), initializer=_begin)
    try:
        yield workers
    finally:
        workers.shutdown(cancel_futures=True)


class Packager:
    """Builds packages in worker processes and caches them between exports.

    Args:
        precision: `engine.precision`.
        workers: the `started_workers` that build packages.
        threads: `engine.threads`. Code for any number of threads would start them for every kernel, even a small one:
            the UNet of the test bundle then took 1.5 times as long in one thread, and far longer on a busy machine.
        exact: whether to build a package for each picture size and number of rows (`profiles.exact_axes`) instead of
            one for all sizes.
        cache: the folder in which packages are cached.
    """

    def __init__(
        self,
        precision: str,
        workers: ProcessPoolExecutor,
        *,
        threads: int = 0,
        exact: bool = False,
        cache: Path | None = None,
    ) -> None:
        import torch

        self._precision, self._exact, self._version = precision, exact, str(torch.__version__)
        self._kind = "cuda" if _on_gpu() else "cpu"
        self._target = target(self._kind)
        self._options = _OPTIONS | {"cpp.threads": threads or len(os.sched_getaffinity(0))}
        self._cache = cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "imprompt", "engines")
        self._workers = workers
        self._building: dict[Path, Future[float]] = {}

    def start(
        self, graph: Graph, folder: Path, bundle: Bundle, stages: Stages | None = None
    ) -> Callable[[], BuiltEngine]:
        """Trace `graph`, write its weights, and queue its packages; return a function that waits for the engine."""
        from imprompt_export.fp8 import quantized
        from imprompt_export.precision import cast, dtype_of
        from imprompt_export.profiles import exact_axes
        from imprompt_export.programs import trace, trace_axes

        stages, begun = stages or Stages(), time.perf_counter()
        folder.mkdir(parents=True)
        file, dtype = folder / f"{graph.name}.json", dtype_of(graph, self._precision)
        variants = exact_axes(graph, bundle) if self._exact else [{}]
        on_gpu, packaged, before = self._kind == "cuda", [], len(self._building)
        in_dtype = cast(graph.module, dtype, self._kind, channels_last=on_gpu)
        with in_dtype, quantized(graph.module, graph.fp8_ranges):
            for number, axes in enumerate(variants, 1):
                stages.show(f"tracing {number} of {len(variants)}")
                sizes = trace_axes(graph) | axes
                program = trace(graph, dtype, axes=sizes, exact=axes, device=self._kind)
                if number == 1:
                    saved = _save_weights(program, file.with_suffix(WEIGHTS))
                    _save_loras(graph, file, saved)
                packaged.append(self._package(f"{graph.name}.{number}", program, folder))
        traced, built = time.perf_counter() - begun, len(self._building) - before

        def wait() -> BuiltEngine:
            seconds, packages = traced, []
            for number, (kept, axes) in enumerate(zip(packaged, variants, strict=True), 1):
                stages.show(f"package {number} of {len(variants)}")
                seconds += self._building[kept].result() if kept in self._building else 0.0
                packages.append(Package(suffix=f".{number}.pt2", axes={axis: int(size) for axis, size in axes.items()}))
                shutil.copyfile(kept, folder / f"{graph.name}.{number}.pt2")
            EngineInfo(
                version=self._version,
                target=self._target,
                inputs={tensor.name: tensor.shape for tensor in graph.inputs},
                internal={t.name: str(dtype).removeprefix("torch.") for t in graph.inputs if t.name in graph.internal},
                outputs=tuple(graph.outputs),
                packages=tuple(packages),
                channels_last=on_gpu,
            ).save(file)
            return BuiltEngine(
                file=file, source=file, seconds=seconds, packages_built=built, packages_reused=len(variants) - built
            )

        return wait

    def _package(self, name: str, program: torch.export.ExportedProgram, work: Path) -> Path:
        """Return the cache path of the package for `program`, and queue its build if necessary.

        Networks of the same architecture share a package.
        """
        import torch

        kept = self._cache / f"{self._key(program)}.pt2"
        if kept in self._building or kept.exists():
            return kept
        self._cache.mkdir(parents=True, exist_ok=True)
        source = work.parent / f"{name}.pt2"
        # The worker needs the memory layout of the weights, not their values.
        for key, weight in program.state_dict.items():
            program.state_dict[key] = _empty_like(weight, "meta")
        torch.export.save(program, source)
        self._building[kept] = self._workers.submit(_build, source, kept, self._kind, self._options)
        return kept

    def _key(self, program: torch.export.ExportedProgram) -> str:
        """Hash everything that a package depends on: constants of the graph by value, weights only by layout."""
        import torch

        lines = [line for line in str(program).splitlines() if not line.lstrip().startswith("#")]
        weights = {
            name: [str(weight.dtype), tuple(weight.shape), weight.stride()]
            for name, weight in program.state_dict.items()
        }
        described = [
            _RECIPE,
            self._version,
            self._target,
            self._options,
            re.sub(r"\s+#.*", "", "\n".join(lines)),
            weights,
        ]
        digest = hashlib.sha256(json.dumps(described).encode())
        for name, constant in sorted(program.constants.items()):
            digest.update(f"{name} {constant.dtype} {tuple(constant.shape)}".encode())
            digest.update(constant.cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:32]


def _save_weights(program: torch.export.ExportedProgram, file: Path) -> list[str]:
    """Write the weights that `program` uses (only one half of a VAE, for example), and return their names in it."""
    tensors, signature = program.state_dict | program.constants, program.graph_signature
    names = signature.inputs_to_parameters | signature.inputs_to_buffers | signature.inputs_to_lifted_tensor_constants
    used = [names[node.name] for node in program.graph.nodes if node.users and node.name in names]
    _save({name: tensors[name].detach().cpu().contiguous() for name in used}, file)
    return used


def _save_loras(graph: Graph, file: Path, saved: Collection[str]) -> None:
    """Write a file for each LoRA of `graph`, with the names that weights have in the program (`Positional.module`).

    Args:
        saved: names of the weights that were written.

    Raises:
        BundleError: a LoRA changes weights that are not among them.
    """
    for name, layers in graph.loras.items():
        tensors = {}
        for layer, factors in layers.items():
            weight = f"module.{layer}.weight"
            if weight not in saved:
                raise BundleError(f"lora {name}: {graph.name} does not use the weights of {layer}")
            tensors[weight + LORA_DOWN], tensors[weight + LORA_UP] = factors.down.contiguous(), factors.up.contiguous()
        _save(tensors, lora_file(file, name))


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, file)
    file.chmod(0o644)  # safetensors lets only the owner read it, but the server may be another user


def _worker_count(*, on_gpu: bool) -> int:
    """Return the number of worker processes that the cores and the memory allow."""
    import torch

    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [len(os.sched_getaffinity(0)), memory // _WORKER_BYTES]
    if on_gpu:
        limits.append(torch.cuda.mem_get_info()[0] // _WORKER_GPU_BYTES)
    return max(1, min(limits))


def _begin() -> None:
    """Set up a worker: one thread, no warnings."""
    import logging
    import warnings

    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)


def _build(source: Path, kept: Path, device: str, options: dict[str, Any]) -> float:
    """Compile the program in `source` into the package `kept`, written atomically; return the seconds it took.

    Raises:
        EngineError: the compiler rejects the program.
    """
    import torch

    from imprompt_export.fake_results import fast_tracing
    from imprompt_export.garbage import rare_collections

    start = time.perf_counter()
    program = torch.export.load(source)
    for name, weight in program.state_dict.items():
        program.state_dict[name] = _empty_like(weight, device)
    draft = kept.with_name(f".{kept.stem}.{uuid.uuid4().hex}.pt2")
    try:
        with torch.no_grad(), fast_tracing(), rare_collections():
            torch._inductor.aoti_compile_and_package(program, package_path=str(draft), inductor_configs=options)
        draft.replace(kept)
    except Exception as error:  # the compiler raises many types, some of which cannot be pickled to the parent process
        raise EngineError(f"AOTInductor cannot build {source.stem}: {one_line(str(error), 600)}") from None
    finally:
        draft.unlink(missing_ok=True)
    return time.perf_counter() - start


def _empty_like(weight: torch.Tensor, device: str) -> torch.Tensor:
    """Allocate a tensor of the same layout; its memory is never written and so takes up no RAM."""
    import torch

    empty = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=device)
    return torch.nn.Parameter(empty, requires_grad=False) if isinstance(weight, torch.nn.Parameter) else empty


BACKENDS = {"inductor": Inductor(name="inductor", distributions=("torch",))}
