"""ONNX file -> OpenVINO's own format, whose weights are mapped when an engine starts."""

from __future__ import annotations

from pathlib import Path


def convert(file: Path) -> Path:
    """Write ``file`` as ``.xml`` and ``.bin`` beside it, in its own precision, and remove it with its external data."""
    import openvino

    target = file.with_suffix(".xml")
    before = list(file.parent.iterdir())
    model = openvino.Core().read_model(file)
    openvino.save_model(model, target, compress_to_fp16=False)
    del model  # it maps the external data
    for old in before:
        old.unlink()
    return target
