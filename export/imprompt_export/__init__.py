"""Checkpoint set -> compiled engines -> Triton model repository."""

from imprompt_export.bundle import BundleError, BundleFile
from imprompt_export.exporter import export

__all__ = ["BundleError", "BundleFile", "export"]
