"""ONNX Runtime: an ONNX file is the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from imprompt_export.backends import ExportBackend

if TYPE_CHECKING:
    from imprompt_export.bundle import EngineSection


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxRuntime(ExportBackend):
    def runner(self, engine: EngineSection) -> str | None:
        """It has no bf16 on the CPU."""
        import torch

        return self.name if engine.precision != "bf16" or torch.cuda.is_available() else None


BACKENDS = {"onnxruntime": OnnxRuntime(name="onnxruntime", distributions=("onnxruntime", "onnxruntime-gpu"))}
