"""Motion adapters and T2I-Adapters of a bundle: what does not fit is refused by name."""

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


def test_image_prompts_meet_the_same_layers_in_both_unets(tmp_path: Path) -> None:
    control.make_motion_adapter(tmp_path / "motion")
    stills = unet()
    assert cross_attention_layers(load_motion_unet(bundle(tmp_path, MOTION), stills, SD15)) == cross_attention_layers(
        stills
    )


def test_a_motion_adapter_for_another_unet(tmp_path: Path) -> None:
    control.make_motion_adapter(tmp_path / "motion", levels=2)
    with pytest.raises(BundleError, match="motion_adapter: motion does not fit the base"):
        load_motion_unet(bundle(tmp_path, MOTION), unet(), SD15)


def test_clips_are_for_sd15(tmp_path: Path) -> None:
    control.make_motion_adapter(tmp_path / "motion")
    with pytest.raises(BundleError, match=r"motion_adapter: clips are served for SD1\.5"):
        load_motion_unet(bundle(tmp_path, MOTION), unet("sdxl"), SDXL)


def test_no_motion_adapter_there(tmp_path: Path) -> None:
    (tmp_path / "motion").mkdir()
    with pytest.raises(BundleError, match=r"motion_adapter: no config\.json"):
        bundle(tmp_path, MOTION)


def test_a_t2i_adapter_for_another_family(tmp_path: Path) -> None:
    control.make_t2i_adapter(tmp_path / "sketch", family="sdxl")
    with pytest.raises(BundleError, match=r"t2i_adapter sketch: .* it is for another family"):
        load_t2i_adapters(bundle(tmp_path, SKETCH), unet(), SD15)


def test_names_of_nets_differ(tmp_path: Path) -> None:
    control.make_t2i_adapter(tmp_path / "sketch")
    with pytest.raises(BundleError, match="names must differ"):
        bundle(tmp_path, SKETCH + SKETCH.replace("t2i_adapter", "controlnet"))


def test_features_follow_the_blocks() -> None:
    assert features(unet(), SD15) == (Residual(32, 0), Residual(64, 1), Residual(64, 2), Residual(64, 3))
    assert features(unet("sdxl"), SDXL) == (Residual(32, 1), Residual(64, 1), Residual(64, 2), Residual(64, 2))
