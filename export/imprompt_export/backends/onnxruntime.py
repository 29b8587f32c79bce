"""ONNX Runtime: the ONNX file is the engine, after its attention layers have been fused."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from imprompt_export.backends import CompileOnnx, ExportBackend
from imprompt_export.errors import BundleError
from imprompt_export.stages import StatusCallback
from imprompt_serving.backends.onnxruntime import DISTRIBUTIONS
from imprompt_serving.specs import Bundle

if TYPE_CHECKING:
    from imprompt_export.graphs import Graph
    from imprompt_export.sections import EngineSection


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxRuntime(ExportBackend):
    def check_installed(self, engine: EngineSection) -> None:
        if find_spec("onnxruntime") is None:
            raise BundleError(
                'engine: ONNX Runtime is not installed: pip install "imprompt[export,cpu]", or "imprompt[export,gpu]"'
            )

    def onnx_compiler(self, engine: EngineSection, refit_from: Path | None) -> CompileOnnx:
        def fuse(graph: Graph, source: Path, bundle: Bundle, show_status: StatusCallback) -> Path:
            from imprompt_export.fused_attention import fuse_attention

            fuse_attention(source)
            return source

        return fuse

    def comparison_backend(self, engine: EngineSection) -> str | None:
        """Return None for bf16 without a GPU: ONNX Runtime has no bf16 on the CPU."""
        import torch

        return self.name if engine.precision != "bf16" or torch.cuda.is_available() else None


BACKENDS = {"onnxruntime": OnnxRuntime(name="onnxruntime", distributions=DISTRIBUTIONS)}
