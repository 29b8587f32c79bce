"""insightface's models for FaceID adapters: found in the folder that the user brings, and checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imprompt_export.bundle import NO_FACES, BundleFile
from imprompt_export.errors import BundleError, some_of

TASKS = ("detection", "recognition")
"""What is needed of a folder such as buffalo_l; its other models (landmarks, gender and age) are left out."""


def find_models(bundle: BundleFile, widths: Mapping[str, int]) -> dict[str, Path]:
    """The file of each of ``TASKS``, as insightface tells them apart; none when the bundle has no face encoder.

    Args:
        widths: FaceID adapters, and the width of the embeddings that they take.

    Raises:
        BundleError: one is missing, or does not go with the adapters, or there are none of those.
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
            raise BundleError(f"face_encoder: several {task} models in {folder}: {some_of(names)}; leave one there")
    ((detector_file, detector),), ((recogniser_file, recogniser),) = (found[task] for task in TASKS)
    if not detector.use_kps:
        raise BundleError(f"face_encoder: {detector_file.name} gives no key points, by which faces are aligned")
    for name, width in widths.items():
        if recogniser.output_shape[-1] != width:
            raise BundleError(
                f"face_encoder: {recogniser_file.name} gives embeddings of width {recogniser.output_shape[-1]}, "
                f"but ip_adapter {name} takes {width}"
            )
    return {"detection": detector_file, "recognition": recogniser_file}


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.onnx"))


def _by_task(folder: Path) -> dict[str, list[tuple[Path, Any]]]:
    """The files of each task with their models."""
    try:
        from insightface import model_zoo
    except ImportError as error:
        raise BundleError(f"face_encoder: install imprompt[face] ({error})") from None
    if model_zoo.has_model_package_manifest(folder):
        raise BundleError(f"face_encoder: {folder} has a manifest; only folders as buffalo_l and antelopev2 are served")
    found: dict[str, list[tuple[Path, Any]]] = {}
    for file in _files(folder):
        try:
            model = model_zoo.get_model(str(file), providers=["CPUExecutionProvider"])
        except Exception as error:
            raise BundleError(f"face_encoder: {file} cannot be loaded: {error}") from error
        if model is not None:
            found.setdefault(model.taskname, []).append((file, model))
    return found
