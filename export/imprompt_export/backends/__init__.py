"""Build engines: one module per backend.

Importing a backend must be quick, because bundle files are checked before torch is imported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from imprompt_export.errors import BundleError, one_of
from imprompt_export.stages import Stages, StatusCallback
from imprompt_serving.backends import MODULES, get_backend
from imprompt_serving.specs import Bundle, Shapes

if TYPE_CHECKING:
    from imprompt_export.checkpoints import Checkpoints
    from imprompt_export.graphs import Axes, Graph
    from imprompt_export.quality import Quality
    from imprompt_export.sections import EngineSection


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltEngine:
    """A built engine: a file in a folder of its own, next to companion files whose names share its stem."""

    file: Path
    source: Path
    """The file (ONNX) that another backend can run for the comparison if this one cannot run here."""
    seconds: float
    packages_built: int = 0
    """Packages of machine code that were compiled."""
    packages_reused: int = 0
    """Packages of machine code that came from an earlier export."""


class StartBuild(Protocol):
    def __call__(self, graph: Graph, folder: Path, bundle: Bundle, stages: Stages) -> Callable[[], BuiltEngine]:
        """Start to build the engine for `graph` in the new `folder`; return a function that waits for the engine.

        Raises:
            EngineError: the backend rejects the graph; raised here or by the returned function.
        """
        ...


class CompileOnnx(Protocol):
    def __call__(self, graph: Graph, source: Path, bundle: Bundle, show_status: StatusCallback) -> Path:
        """Compile the ONNX file `source` of `graph`; return the engine, which has its folder to itself.

        Raises:
            EngineError: the backend rejects the graph.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportBackend:
    """Builds the engines of one backend and compares them with PyTorch.

    By default the ONNX files themselves are the engines; a backend overrides what it does differently.
    """

    name: str
    distributions: tuple[str, ...]
    """The pip packages that build the engines; the report records their versions."""
    refittable: bool = False
    """Whether an engine's weights can be replaced (`engine.refit`, `--refit-from`)."""
    fp16_vae: bool = True
    """Whether the VAE computes in fp16 if the engines compute in bf16: it is closer to fp32, but slow on CPUs."""

    def check(self, engine: EngineSection) -> None:
        """Refuse values of `[engine]` that this backend does not support.

        Raises:
            BundleError: names the key and its allowed values.
        """
        served = get_backend(self.name)
        one_of(f"engine.precision (with {self.name})", engine.precision, served.precisions)
        one_of(f"engine.host (with {self.name})", engine.host, served.hosts)
        if engine.refit and not self.refittable:
            raise BundleError(f"engine.refit: only TensorRT engines can be refitted, not those of {self.name}")

    def check_installed(self, engine: EngineSection) -> None:
        """Check that the packages that this backend needs are installed and recent enough.

        Raises:
            BundleError, EngineError: names what to install.
        """

    @contextmanager
    def builder(self, engine: EngineSection, refit_from: Path | None) -> Iterator[StartBuild]:
        """Yield the function that builds the engines of one export.

        By default it exports each graph to ONNX and passes the file to `onnx_compiler`.

        Raises:
            EngineError: engines cannot be built on this machine, or `refit_from` holds none to refit.
        """
        from imprompt_export.onnx_graph import export_onnx
        from imprompt_export.precision import dtype_of

        compile_onnx = self.onnx_compiler(engine, refit_from)

        def make(graph: Graph, folder: Path, bundle: Bundle, stages: Stages) -> Callable[[], BuiltEngine]:
            def wait() -> BuiltEngine:
                start, source = time.perf_counter(), folder / f"{graph.name}.onnx"
                export_onnx(graph, source, dtype_of(graph, engine.precision), stages)
                with stages.time("building"):
                    file = compile_onnx(graph, source, bundle, stages.show)
                return BuiltEngine(file=file, source=source, seconds=time.perf_counter() - start)

            return wait

        yield make

    def onnx_compiler(self, engine: EngineSection, refit_from: Path | None) -> CompileOnnx:
        """Return the function that compiles ONNX files; by default the ONNX file is the engine.

        Raises:
            EngineError: engines cannot be built on this machine, or `refit_from` holds none to refit.
        """
        return lambda graph, source, bundle, show_status: source

    def comparison_backend(self, engine: EngineSection) -> str | None:
        """Return the backend that runs the engines for the comparison on this machine; None if none can.

        A backend other than this one runs `BuiltEngine.source`.
        """
        return self.name

    def is_exported(self, engine: EngineSection, graph: Graph) -> bool:
        """Return whether an export needs the weights of `graph` in PyTorch no longer, once its engine is compared."""
        return True

    def check_axes(self, graph: Graph, bundle: Bundle) -> tuple[Axes, ...]:
        """Return the sizes at which an engine is compared with PyTorch."""
        return graph.checks

    def sizes(self, shapes: Shapes) -> tuple[tuple[int, int], ...]:
        """Return the heights and widths of pictures that engines are built for; empty if any size in `shapes` works."""
        return ()

    def max_batch_size(self, graph: Graph, bundle: Bundle) -> int:
        """Return the maximum number of rows that Triton may put into one call of an engine."""
        from imprompt_export.profiles import batch_range

        return batch_range(graph, bundle).max

    def calibrate(
        self,
        engine: EngineSection,
        bundle: Bundle,
        checkpoints: Checkpoints,
        graphs: list[Graph],
        show_status: StatusCallback,
    ) -> list[Graph]:
        """Return `graphs` with the results of calibration runs; by default there are none."""
        return graphs

    def finish(
        self,
        engine: EngineSection,
        bundle: Bundle,
        checkpoints: Checkpoints,
        graphs: Mapping[str, Graph],
        files: Mapping[str, Path],
        stages: Stages,
    ) -> tuple[Mapping[str, Path], list[Quality]]:
        """Process all engines together after each has been compared; return the files to serve and their quality.

        Raises:
            QualityError: an engine has lost too much precision.
        """
        return files, []


def export_backend(name: str) -> ExportBackend:
    """Return the backend called `name`, a key of `imprompt_serving.backends.MODULES`."""
    found: ExportBackend = import_module(f"{__name__}.{MODULES[name]}").BACKENDS[name]
    return found
