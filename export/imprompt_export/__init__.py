"""Checkpoint set -> engines -> Triton model repository."""

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

    Models of other bundles in `repository` stay; those of a bundle of the same name are replaced, all at once, after
    everything is exported and checked. TensorRT engines under `refit_from` get the weights of the bundle instead of
    being built again (`backends.tensorrt.Builder`).

    Raises:
        BundleError: something in the bundle file or its checkpoints does not fit; nothing was written.
        ParityError: an engine does not compute what PyTorch does, or loses too much when quantized; nothing was
            written.
        EngineError: an engine cannot be made; nothing was written.
    """
    from imprompt_export import checks, install
    from imprompt_export.quiet import quiet

    bundle, repository = BundleFile.load(bundle_path), Path(repository)
    checks.check_options(bundle, refit_from)
    checks.check_checkpoints(bundle)
    install.check_free(repository, bundle.name, bundle.models())
    with install.work_folder(repository, bundle.name) as work:
        with quiet():
            # Only now: torch and its companions take many seconds to import.
            from imprompt_export.exporter import export_bundle

            made = export_bundle(bundle, work, console, refit_from)
        install.install(work / "models", repository, bundle.name)
    return made
