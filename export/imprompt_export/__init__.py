"""Checkpoint set -> compiled engines -> Triton model repository."""

from typing import TYPE_CHECKING, Any

from imprompt_export.bundle import BundleError, BundleFile
from imprompt_serving.engines import EngineError

if TYPE_CHECKING:
    from imprompt_export.exporter import export

__all__ = ["BundleError", "BundleFile", "EngineError", "export"]


def __getattr__(name: str) -> Any:
    """``export``, loaded when it is asked for: ``benchmarks/gpu`` takes graphs alone, without most of its packages."""
    if name == "export":
        from imprompt_export.exporter import export

        return export
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
