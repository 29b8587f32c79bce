"""OpenVINO: convert ONNX files to its own format, whose weights are memory-mapped at start, and optionally to int8."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from imprompt_export.backends import CompileOnnx, ExportBackend
from imprompt_export.errors import BundleError
from imprompt_export.stages import StatusCallback
from imprompt_serving.specs import Bundle

if TYPE_CHECKING:
    from imprompt_export.checkpoints import Checkpoints
    from imprompt_export.graphs import Graph
    from imprompt_export.quality import Quality
    from imprompt_export.sections import EngineSection


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenVino(ExportBackend):
    def check_installed(self, engine: EngineSection) -> None:
        extras = {"openvino": "openvino"} | ({"nncf": "int8"} if engine.precision == "int8" else {})
        missing = [package for package in extras if find_spec(package) is None]
        if missing:
            install = f'pip install "imprompt[export,{",".join(extras[package] for package in missing)}]"'
            raise BundleError(f"engine: {', '.join(missing)} is not installed: {install}")

    def onnx_compiler(self, engine: EngineSection, refit_from: Path | None) -> CompileOnnx:
        return lambda graph, source, bundle, show_status: convert(source)

    def is_exported(self, engine: EngineSection, graph: Graph) -> bool:
        """Return False for what calibration runs with PyTorch: all but the networks of a step and the projections."""
        in_engines = ("unet", "controlnet_", "t2i_adapter_", "image_projection_", "motion_unet")
        return engine.precision != "int8" or graph.name.startswith(in_engines)

    def finish(
        self,
        engine: EngineSection,
        bundle: Bundle,
        checkpoints: Checkpoints,
        graphs: Mapping[str, Graph],
        files: Mapping[str, Path],
        show_status: StatusCallback,
    ) -> tuple[Mapping[str, Path], list[Quality]]:
        """Quantize to int8 if that is the precision; calibration runs the denoising loop and so needs all engines."""
        if engine.precision != "int8":
            return files, []
        from imprompt_export.int8 import quantize_bundle
        from imprompt_export.quality import check_quality

        show_status("quantizing to int8")
        quantized, quality = quantize_bundle(bundle, checkpoints, files, engine.min_snr_db)
        check_quality(quality)
        return quantized, quality


def convert(file: Path) -> Path:
    """Replace an ONNX file and its external data by `.xml` and `.bin` of the same precision; return the `.xml`."""
    import openvino

    target = file.with_suffix(".xml")
    before = list(file.parent.iterdir())
    model = openvino.Core().read_model(file)
    openvino.save_model(model, target, compress_to_fp16=False)
    del model  # it has mapped the external data, which is deleted next
    for old in before:
        old.unlink()
    return target


BACKENDS = {"openvino": OpenVino(name="openvino", distributions=("openvino", "nncf"))}
