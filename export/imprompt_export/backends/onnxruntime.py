"""ONNX Runtime: an ONNX file is the engine."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from imprompt_export.backends import ExportBackend
from imprompt_export.errors import BundleError
from imprompt_serving.backends.onnxruntime import DISTRIBUTIONS

if TYPE_CHECKING:
    from imprompt_export.bundle import EngineSection


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxRuntime(ExportBackend):
    def check_installed(self, engine: EngineSection) -> None:
        if find_spec("onnxruntime") is None:
            raise BundleError(
                'engine: ONNX Runtime is not installed: pip install "imprompt[export,cpu]", or "imprompt[export,gpu]"'
            )

    def runner(self, engine: EngineSection) -> str | None:
        """It has no bf16 on the CPU."""
        import torch

        return self.name if engine.precision != "bf16" or torch.cuda.is_available() else None


BACKENDS = {"onnxruntime": OnnxRuntime(name="onnxruntime", distributions=DISTRIBUTIONS)}
