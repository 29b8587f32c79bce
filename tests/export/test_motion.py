"""Motion adapters and T2I-Adapters that do not fit the bundle are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel

from imprompt_export import BundleError, BundleFile
from imprompt_export.families import export_family
from imprompt_export.image_prompt import cross_attention_layers
from imprompt_export.motion import load_motion_unet
from imprompt_export.t2i import features, load_t2i_adapters
from imprompt_serving.specs import Residual
from tiny import base, control

SD15, SDXL = export_family("sd15"), export_family("sdxl")
MOTION = '[motion_adapter]\npath = "motion"\n'
SKETCH = '[[t2i_adapter]]\nname = "sketch"\npath = "sketch"\n'


def bundle(folder: Path, sections: str) -> BundleFile:
    (folder / "base").mkdir(exist_ok=True)
    (folder / "bundle.toml").write_text(f'name = "tiny"\nbase = "base"\n{sections}')
    return BundleFile.load(folder / "bundle.toml")


def unet(family: base.Family = "sd15", levels: int = 4) -> UNet2DConditionModel:
    return UNet2DConditionModel(**base.unet_config(family, levels=levels))


def test_both_unets_have_the_same_cross_attention_layers(tmp_path: Path) -> None:
    control.make_motion_adapter(tmp_path / "motion")
    stills = unet()
    assert cross_attention_layers(load_motion_unet(bundle(tmp_path, MOTION), stills, SD15)) == cross_attention_layers(
        stills
    )


def test_motion_adapter_for_another_unet_is_refused(tmp_path: Path) -> None:
    control.make_motion_adapter(tmp_path / "motion", levels=2)
    with pytest.raises(BundleError, match="motion_adapter: motion does not fit the base"):
        load_motion_unet(bundle(tmp_path, MOTION), unet(), SD15)


def test_motion_adapters_are_only_supported_for_sd15(tmp_path: Path) -> None:
    control.make_motion_adapter(tmp_path / "motion")
    with pytest.raises(BundleError, match=r"motion_adapter: clips are only supported for SD1\.5 bases"):
        load_motion_unet(bundle(tmp_path, MOTION), unet("sdxl"), SDXL)


def test_empty_motion_adapter_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "motion").mkdir()
    with pytest.raises(BundleError, match=r"motion_adapter: no config\.json"):
        bundle(tmp_path, MOTION)


def test_t2i_adapter_for_another_family_is_refused(tmp_path: Path) -> None:
    control.make_t2i_adapter(tmp_path / "sketch", family="sdxl")
    with pytest.raises(BundleError, match=r"t2i_adapter sketch: .* it is made for another family"):
        load_t2i_adapters(bundle(tmp_path, SKETCH), unet(), SD15)


def test_controlnets_and_t2i_adapters_cannot_share_a_name(tmp_path: Path) -> None:
    control.make_t2i_adapter(tmp_path / "sketch")
    with pytest.raises(BundleError, match="names must differ"):
        bundle(tmp_path, SKETCH + SKETCH.replace("t2i_adapter", "controlnet"))


def test_features_match_the_blocks_of_the_unet() -> None:
    assert features(unet(), SD15) == (Residual(32, 0), Residual(64, 1), Residual(64, 2), Residual(64, 3))
    assert features(unet("sdxl"), SDXL) == (Residual(32, 1), Residual(64, 1), Residual(64, 2), Residual(64, 2))
