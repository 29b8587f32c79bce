"""ControlNets that do not fit the bundle are refused by name before the export."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel

from imprompt_export import BundleError, BundleFile
from imprompt_export.control import load_controlnets, residuals
from imprompt_serving.specs import Residual
from tiny import base, control


def bundle(folder: Path, sections: str) -> BundleFile:
    (folder / "base").mkdir(exist_ok=True)
    (folder / "bundle.toml").write_text(f'name = "tiny"\nbase = "base"\n{sections}')
    return BundleFile.load(folder / "bundle.toml")


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(**base.unet_config("sd15"))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ('name = "depth"\npath = "gone"', "gone"),
        ('name = "depth"\npath = "empty"', "controlnet depth: no config.json"),
        ('name = "depth"\npath = "net"\nscale = 1.0', "scale"),
        ('name = "Depth"\npath = "net"', "controlnet.name"),
        ('name = "depth"', "path"),
    ],
)
def test_bad_sections_are_refused(tmp_path: Path, section: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "net").mkdir()
    (tmp_path / "net/config.json").write_text("{}")
    with pytest.raises(BundleError, match=message):
        bundle(tmp_path, f"[[controlnet]]\n{section}\n")


def test_duplicate_names_are_refused(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    (tmp_path / "net/config.json").write_text("{}")
    with pytest.raises(BundleError, match="names must differ"):
        bundle(tmp_path, '[[controlnet]]\nname = "depth"\npath = "net"\n' * 2)


def test_controlnet_of_another_family_is_refused(tmp_path: Path) -> None:
    control.make_controlnet(tmp_path / "net", family="sdxl")
    loaded = bundle(tmp_path, '[[controlnet]]\nname = "depth"\npath = "net"\n')
    with pytest.raises(BundleError, match="controlnet depth: its cross_attention_dim is 128, but the base needs 48"):
        load_controlnets(loaded, unet())


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    control.make_controlnet(tmp_path / "net")
    next((tmp_path / "net").glob("*.safetensors")).unlink()
    loaded = bundle(tmp_path, '[[controlnet]]\nname = "depth"\npath = "net"\n')
    with pytest.raises(BundleError, match="controlnet depth"):
        load_controlnets(loaded, unet())


def test_residuals_follow_the_skip_connections() -> None:
    assert residuals(unet()) == (
        Residual(32, 0), Residual(32, 0), Residual(32, 1), Residual(64, 1), Residual(64, 2),
        Residual(64, 2), Residual(64, 3), Residual(64, 3), Residual(64, 3),
    )  # fmt: skip
