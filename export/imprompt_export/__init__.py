"""Checkpoint set -> compiled engines -> Triton model repository."""

from imprompt_export.bundle import BundleError, BundleFile
from imprompt_export.exporter import export
from imprompt_serving.engines import EngineError

__all__ = ["BundleError", "BundleFile", "EngineError", "export"]
