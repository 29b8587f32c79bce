"""Find and check the insightface models for FaceID adapters, in the folder that the user supplies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imprompt_export.bundle import NO_FACES, BundleFile
from imprompt_export.errors import BundleError, some_of

TASKS = ("detection", "recognition")
"""The tasks whose models are needed; other models in a folder such as buffalo_l (landmarks, gender, age) are not."""


def find_models(bundle: BundleFile, widths: Mapping[str, int]) -> dict[str, Path]:
    """Find the model file for each of `TASKS`, as insightface recognizes them; empty without a face encoder.

    Args:
        bundle: the bundle.
        widths: the width of the embeddings that each FaceID adapter takes, by its name.

    Raises:
        BundleError: a model is missing or does not fit the adapters, or the bundle has no FaceID adapter.
    """
    if bundle.face_encoder is None:
        return {}
    if not widths:
        raise BundleError(NO_FACES)
    folder = bundle.folder / bundle.face_encoder.path
    found = _by_task(folder)
    for task in TASKS:
        names = [file.name for file, _ in found.get(task, ())]
        if not names:
            raise BundleError(f"face_encoder: no {task} model among {some_of(file.name for file in _files(folder))}")
        if len(names) > 1:
            raise BundleError(f"face_encoder: several {task} models in {folder}: {some_of(names)}; keep only one")
    ((detector_file, detector),), ((recognizer_file, recognizer),) = (found[task] for task in TASKS)
    if not detector.use_kps:
        raise BundleError(f"face_encoder: {detector_file.name} has no key points, which are needed to align faces")
    for name, width in widths.items():
        if recognizer.output_shape[-1] != width:
            raise BundleError(
                f"face_encoder: {recognizer_file.name} produces embeddings of width {recognizer.output_shape[-1]}, "
                f"but ip_adapter {name} needs {width}"
            )
    return {"detection": detector_file, "recognition": recognizer_file}


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.onnx"))


def _by_task(folder: Path) -> dict[str, list[tuple[Path, Any]]]:
    """Load the models in `folder` and group them by task, each with its file."""
    try:
        from insightface import model_zoo
    except ImportError as error:
        raise BundleError(f'face_encoder: pip install "imprompt[face]": {error}') from None
    if model_zoo.has_model_package_manifest(folder):
        raise BundleError(f"face_encoder: {folder} has a manifest; only folders like buffalo_l and antelopev2 work")
    found: dict[str, list[tuple[Path, Any]]] = {}
    for file in _files(folder):
        try:
            model = model_zoo.get_model(str(file), providers=["CPUExecutionProvider"])
        except Exception as error:
            raise BundleError(f"face_encoder: {file} cannot be loaded: {error}") from error
        if model is not None:
            found.setdefault(model.taskname, []).append((file, model))
    return found
