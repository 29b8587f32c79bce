"""ONNX file -> OpenVINO's own format, whose weights are mapped when an engine starts; int8 on request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from imprompt_export.backends import Compile, ExportBackend, Tell
from imprompt_export.errors import BundleError
from imprompt_serving.specs import Bundle

if TYPE_CHECKING:
    from imprompt_export.bundle import EngineSection
    from imprompt_export.checkpoints import Checkpoints
    from imprompt_export.graphs import Graph
    from imprompt_export.quality import Quality


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenVino(ExportBackend):
    def check_installed(self, engine: EngineSection) -> None:
        extras = {"openvino": "openvino"} | ({"nncf": "int8"} if engine.precision == "int8" else {})
        missing = [package for package in extras if find_spec(package) is None]
        if missing:
            install = f'pip install "imprompt[export,{",".join(extras[package] for package in missing)}]"'
            raise BundleError(f"engine: {', '.join(missing)} is not installed: {install}")

    def compiler(self, engine: EngineSection, refit_from: Path | None) -> Compile:
        return lambda graph, source, bundle, tell: convert(source)

    def finish(
        self,
        engine: EngineSection,
        bundle: Bundle,
        checkpoints: Checkpoints,
        graphs: Mapping[str, Graph],
        files: Mapping[str, Path],
        tell: Tell,
    ) -> tuple[Mapping[str, Path], list[Quality]]:
        """Quantize to int8, if that is the precision: it wants denoising runs, and so all engines."""
        if engine.precision != "int8":
            return files, []
        from imprompt_export.int8 import quantize_bundle
        from imprompt_export.quality import check_quality

        tell("quantizing to int8")
        checkpoints.pipeline.unet.to("meta")  # its weights are in the engine; quantization wants the memory
        quantized, quality = quantize_bundle(bundle, checkpoints, files, engine.min_snr_db)
        check_quality(quality)
        return quantized, quality


def convert(file: Path) -> Path:
    """Write `file` as `.xml` and `.bin` beside it, in its own precision, and remove it with its external data."""
    import openvino

    target = file.with_suffix(".xml")
    before = list(file.parent.iterdir())
    model = openvino.Core().read_model(file)
    openvino.save_model(model, target, compress_to_fp16=False)
    del model  # it maps the external data
    for old in before:
        old.unlink()
    return target


BACKENDS = {"openvino": OpenVino(name="openvino", distributions=("openvino", "nncf"))}
