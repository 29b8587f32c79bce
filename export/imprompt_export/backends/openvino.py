"""OpenVINO: convert ONNX files to its own format, whose weights are memory-mapped at start, and optionally to int8."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from imprompt_export.backends import CompileOnnx, ExportBackend
from imprompt_export.errors import BundleError
from imprompt_export.stages import Stages
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
        """Return False for the text encoders of int8, because calibration runs these with PyTorch."""
        return engine.precision != "int8" or not graph.name.startswith("text_encoder")

    def finish(
        self,
        engine: EngineSection,
        bundle: Bundle,
        checkpoints: Checkpoints,
        graphs: Mapping[str, Graph],
        files: Mapping[str, Path],
        stages: Stages,
    ) -> tuple[Mapping[str, Path], list[Quality]]:
        """Quantize to int8 if that is the precision; calibration runs the denoising loop and so needs all engines."""
        if engine.precision != "int8":
            return files, []
        from imprompt_export.int8 import quantize_bundle
        from imprompt_export.quality import check_quality

        quantized, quality = quantize_bundle(bundle, checkpoints, files, engine.min_snr_db, stages)
        check_quality(quality)
        return quantized, quality


def convert(file: Path) -> Path:
    """Replace an ONNX file and its external data by `.xml` and `.bin` of the same precision; return the `.xml`.

    Inputs and outputs in bf16 become float32, because numpy has no bf16.
    """
    import openvino
    from openvino.preprocess import PrePostProcessor

    target = file.with_suffix(".xml")
    before = list(file.parent.iterdir())
    model = openvino.Core().read_model(file)
    ends = PrePostProcessor(model)
    for ports, end in ((model.inputs, ends.input), (model.outputs, ends.output)):
        for index, port in enumerate(ports):
            if port.element_type == openvino.Type.bf16:
                end(index).tensor().set_element_type(openvino.Type.f32)
    model = ends.build()
    openvino.save_model(model, target, compress_to_fp16=False)
    del ends, model  # they have mapped the external data, which is deleted next
    for old in before:
        old.unlink()
    return target


BACKENDS = {"openvino": OpenVino(name="openvino", distributions=("openvino", "nncf"), fp16_vae=False)}
