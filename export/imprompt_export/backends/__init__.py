"""Backends: how engines are made. One module each, light to import: bundle files are checked before torch loads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from imprompt_export.errors import BundleError, one_of
from imprompt_serving.backends import MODULES, get_backend
from imprompt_serving.specs import Bundle, Shapes

if TYPE_CHECKING:
    from imprompt_export.bundle import EngineSection
    from imprompt_export.checkpoints import Checkpoints
    from imprompt_export.graphs import Axes, Graph
    from imprompt_export.quality import Quality

Tell = Callable[[str], None]
"""Takes a line about what is being done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """An engine: a file, with others beside it whose names begin alike, in a folder that holds nothing else."""

    file: Path
    source: Path
    """What a backend other than its own runs in its place for the comparison: an ONNX file."""
    seconds: float
    built: int = 0
    kept: int = 0
    """Packages of machine code that were built, and those that an earlier export had built."""


class Make(Protocol):
    def __call__(self, graph: Graph, folder: Path, bundle: Bundle, tell: Tell) -> Callable[[], Made]:
        """Begin to make the engine of `graph` in the new `folder`; what is returned waits until it is made.

        Raises:
            EngineError: the graph is refused; now or by what is returned.
        """
        ...


class Compile(Protocol):
    def __call__(self, graph: Graph, source: Path, bundle: Bundle, tell: Tell) -> Path:
        """Make the engine of `graph` from its ONNX file; returns the engine, whose folder has nothing else in it.

        Raises:
            EngineError: the graph is refused.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportBackend:
    """How engines of one backend are made, and compared with PyTorch. As it is here: ONNX files are the engines."""

    name: str
    distributions: tuple[str, ...]
    """What `pip` calls the packages that make its engines; the report has their versions."""
    refittable: bool = False
    """Whether an engine's weights can be replaced (`engine.refit`, `--refit-from`)."""

    def check(self, engine: EngineSection) -> None:
        """Refuse values of `[engine]` that do not go with this backend.

        Raises:
            BundleError: names the key, and what it may be.
        """
        served = get_backend(self.name)
        one_of(f"engine.precision (with {self.name})", engine.precision, served.precisions)
        one_of(f"engine.host (with {self.name})", engine.host, served.hosts)
        if engine.refit and not self.refittable:
            raise BundleError(f"engine.refit: is for TensorRT's engines; {self.name} has nothing to refit")

    def check_installed(self, engine: EngineSection) -> None:
        """Refuse an export for which packages are missing, or too old.

        Raises:
            BundleError, EngineError: says what to install.
        """

    @contextmanager
    def maker(self, engine: EngineSection, refit_from: Path | None) -> Iterator[Make]:
        """What makes the engines of one export. As it is here: exports ONNX files, and gives each to `compiler`.

        Raises:
            EngineError: engines cannot be made here, or there is nothing to refit in `refit_from`.
        """
        from imprompt_export.onnx_graph import export_onnx
        from imprompt_export.precision import dtype_of

        compile_onnx = self.compiler(engine, refit_from)

        def make(graph: Graph, folder: Path, bundle: Bundle, tell: Tell) -> Callable[[], Made]:
            def wait() -> Made:
                start, source = time.perf_counter(), folder / f"{graph.name}.onnx"
                export_onnx(graph, source, dtype_of(graph, engine.precision))
                file = compile_onnx(graph, source, bundle, tell)
                return Made(file=file, source=source, seconds=time.perf_counter() - start)

            return wait

        yield make

    def compiler(self, engine: EngineSection, refit_from: Path | None) -> Compile:
        """What makes engines from ONNX files.

        Raises:
            EngineError: engines cannot be made here, or there is nothing to refit in `refit_from`.
        """
        return lambda graph, source, bundle, tell: source

    def runner(self, engine: EngineSection) -> str | None:
        """The backend that can run these engines here, for the comparison; None if there is none.

        A backend other than this one gets `Made.source`.
        """
        return self.name

    def check_axes(self, graph: Graph, bundle: Bundle) -> tuple[Axes, ...]:
        """Sizes at which an engine is compared with PyTorch."""
        return graph.checks

    def sizes(self, shapes: Shapes) -> tuple[tuple[int, int], ...]:
        """Heights and widths of pictures that the engines are built for one by one; none: all within `shapes`."""
        return ()

    def max_batch_size(self, graph: Graph, bundle: Bundle) -> int:
        """The most rows that Triton may put into one call of an engine."""
        from imprompt_export.profiles import batch

        return batch(graph, bundle).max

    def calibrated(
        self, engine: EngineSection, bundle: Bundle, checkpoints: Checkpoints, todo: list[Graph], tell: Tell
    ) -> list[Graph]:
        """Return `todo` with what engines need to know from denoising runs. As it is here: nothing."""
        return todo

    def finish(
        self,
        engine: EngineSection,
        bundle: Bundle,
        checkpoints: Checkpoints,
        graphs: Mapping[str, Graph],
        files: Mapping[str, Path],
        tell: Tell,
    ) -> tuple[Mapping[str, Path], list[Quality]]:
        """Work on all engines together, when each has been compared; returns the files to serve, and their quality.

        Raises:
            QualityError: an engine has lost too much.
        """
        return files, []


def export_backend(name: str) -> ExportBackend:
    """The backend called `name`, a key of `imprompt_serving.backends.MODULES`."""
    found: ExportBackend = import_module(f"{__name__}.{MODULES[name]}").BACKENDS[name]
    return found
