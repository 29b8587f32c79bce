"""Folders of face models are checked before the export, and errors name what is wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import bundles
from imprompt_export import BundleError, BundleFile
from imprompt_export.checks import check_checkpoints
from imprompt_export.faces import find_models
from tiny import adapters, base
from tiny.faces import make_face_models

pytestmark = pytest.mark.skipif(not bundles.FACES, reason="needs insightface: install imprompt[face]")
WIDTHS = {"portrait": 512}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_face_models(tmp_path / "buffalo")
    adapters.make_adapter(tmp_path / "ip", "faceid_portrait")
    base.make_sd15(tmp_path / "base")
    return tmp_path


def load(folder: Path, more: str = "", adapter: bool = True) -> BundleFile:
    file = folder / "bundle.toml"
    section = bundles.adapter("portrait", next((folder / "ip").glob("*.*")), folder / "ip", None) if adapter else ""
    head = 'name = "tiny"\nbase = "base"\n'
    file.write_text(f'{head}{section}\n[face_encoder]\npath = "buffalo"\n{more}')
    return BundleFile.load(file)


def test_detector_and_recognizer_are_found(folder: Path) -> None:
    found = find_models(load(folder), WIDTHS)
    assert {task: file.name for task, file in found.items()} == {
        "detection": "det_10g.onnx",
        "recognition": "w600k_r50.onnx",
    }


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("det_size = [100, 640]", "det_size"),
        ("det_size = [640]", "det_size"),
        ("det_thresh = 1.5", "det_thresh"),
        ("color = 1", "color"),
    ],
)
def test_options_are_checked(folder: Path, more: str, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        load(folder, more)


def test_missing_folder_is_refused(folder: Path) -> None:
    (folder / "buffalo").rename(folder / "elsewhere")
    with pytest.raises(BundleError, match=r"face_encoder\.path.*buffalo"):
        load(folder)


def test_bundle_without_adapters_is_refused(folder: Path) -> None:
    with pytest.raises(BundleError, match="no FaceID adapter"):
        load(folder, adapter=False)


def test_bundle_without_faceid_adapters_is_refused(folder: Path) -> None:
    with pytest.raises(BundleError, match="no FaceID adapter"):
        find_models(load(folder), {})
    (folder / "ip/ip-adapter-faceid-portrait_sd15.bin").unlink()
    adapters.make_image_encoder(folder / "ip/models/image_encoder")
    adapters.make_adapter(folder / "ip", "plain")
    text = (folder / "bundle.toml").read_text().replace("image_encoder_folder = false", "")
    text = text.replace("-faceid-portrait_sd15.bin", "_sd15.safetensors").replace(
        'subfolder = "."', 'subfolder = "models"'
    )
    (folder / "bundle.toml").write_text(text)
    with pytest.raises(BundleError, match="no FaceID adapter"):
        check_checkpoints(BundleFile.load(folder / "bundle.toml"))


@pytest.mark.parametrize(("name", "task"), [("det_10g", "detection"), ("w600k_r50", "recognition")])
def test_missing_model_is_refused(folder: Path, name: str, task: str) -> None:
    (folder / f"buffalo/{name}.onnx").unlink()
    with pytest.raises(BundleError, match=rf"no {task} model among .*genderage\.onnx"):
        find_models(load(folder), WIDTHS)


@pytest.mark.parametrize(("name", "task"), [("det_10g", "detection"), ("w600k_r50", "recognition")])
def test_two_models_for_one_task_are_refused(folder: Path, name: str, task: str) -> None:
    shutil.copyfile(folder / f"buffalo/{name}.onnx", folder / "buffalo/another.onnx")
    with pytest.raises(BundleError, match=rf"several {task} models in .*: another\.onnx, {name}\.onnx; keep only one"):
        find_models(load(folder), WIDTHS)


def test_damaged_file_is_refused(folder: Path) -> None:
    (folder / "buffalo/det_10g.onnx").write_bytes(b"not a model")
    with pytest.raises(BundleError, match=r"det_10g\.onnx cannot be loaded"):
        find_models(load(folder), WIDTHS)


def test_recognizer_of_another_width_is_refused(folder: Path) -> None:
    make_face_models(folder / "buffalo", width=192)
    with pytest.raises(BundleError, match="width 192, but ip_adapter portrait needs 512"):
        find_models(load(folder), WIDTHS)
