"""Export a set of checkpoints to a Triton model repository of compiled engines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from imprompt_export.bundle import BundleFile
from imprompt_export.errors import BundleError
from imprompt_serving.backends import EngineError

if TYPE_CHECKING:
    from rich.console import Console

    from imprompt_export.report import Report

__all__ = ["BundleError", "BundleFile", "EngineError", "export"]


def export(
    bundle_path: str | Path,
    repository: str | Path,
    console: Console | None = None,
    refit_from: Path | None = None,
) -> Report:
    """Export the bundle at `bundle_path` into `repository` and compare each engine with PyTorch.

    Models of other bundles in `repository` are left alone. The models of a bundle of the same name are replaced all at
    once, after everything has been exported and checked.

    Args:
        bundle_path: the bundle file (TOML).
        repository: the Triton model repository; created if it does not exist.
        console: where to report progress; by default stderr.
        refit_from: a folder of TensorRT engines; those that fit get the weights of this bundle instead of being built
            again (`backends.tensorrt.Builder`).

    Raises:
        BundleError: the bundle file or one of its checkpoints is not usable; nothing was written.
        ParityError: an engine's results differ from PyTorch's by more than is allowed, or quantization loses too much
            quality; nothing was written.
        EngineError: an engine cannot be built; nothing was written.
    """
    from imprompt_export import checks, install
    from imprompt_export.quiet import quiet

    bundle, repository = BundleFile.load(bundle_path), Path(repository)
    checks.check_options(bundle, refit_from)
    checks.check_checkpoints(bundle)
    install.check_free(repository, bundle.name, bundle.models())
    with install.work_folder(repository, bundle.name) as work:
        with quiet():
            # Imported only now, because torch and its companions take many seconds.
            from imprompt_export.exporter import export_bundle

            report = export_bundle(bundle, work, console, refit_from)
        install.install(work / "models", repository, bundle.name)
    return report
