"""Families: which bases belong to each, and which are refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import diffusers
import pytest

from imprompt_export import BundleError
from imprompt_export.families import all_families, export_family, family_of
from imprompt_serving import families

TEXT = ["transformers", "CLIPTextModel"]
NOTHING = [None, None]


@pytest.mark.parametrize("pipeline", [name for family in all_families() for name in family.pipelines])
def test_family_is_found_by_pipeline(pipeline: str) -> None:
    assert hasattr(diffusers, pipeline)
    assert family_of(pipeline, {}).name == ("sdxl" if "XL" in pipeline else "sd15")


@pytest.mark.parametrize("task", ["Img2Img", "Inpaint"])
def test_refiner_is_told_apart_by_its_aesthetic_score(task: str) -> None:
    pipeline = f"StableDiffusionXL{task}Pipeline"
    assert family_of(pipeline, {"requires_aesthetics_score": True}).name == "sdxl_refiner"
    assert family_of(pipeline, {"requires_aesthetics_score": False}).name == "sdxl"
    with pytest.raises(BundleError, match=r"base: StableDiffusionPipeline with requires_aesthetics_score is not supp"):
        family_of("StableDiffusionPipeline", {"requires_aesthetics_score": True})


@pytest.mark.parametrize("pipeline", [None, "FluxPipeline"])
def test_unknown_pipeline_is_refused(pipeline: str | None) -> None:
    with pytest.raises(BundleError, match=rf"base: {pipeline} is not supported; expected one of Latent.*, StableDiff"):
        family_of(pipeline, {})


@pytest.mark.parametrize(
    ("family", "index", "message"),
    [
        ("sd15", {}, "base: it has no text_encoder$"),
        ("sd15", {"text_encoder": NOTHING}, "base: it has no text_encoder$"),
        ("sdxl", {"text_encoder": NOTHING, "text_encoder_2": TEXT}, "base: it has no text_encoder$"),
        ("sdxl", {"text_encoder": TEXT}, "base: it has no text_encoder_2"),
        ("sdxl_refiner", {"text_encoder": NOTHING}, "base: it has no text_encoder_2"),
    ],
)
def test_bases_without_a_text_encoder_are_refused(family: str, index: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        export_family(family).check_base(index)


def test_complete_bases_pass() -> None:
    export_family("sd15").check_base({"text_encoder": TEXT})
    export_family("sdxl").check_base({"text_encoder": TEXT, "text_encoder_2": TEXT})
    export_family("sdxl_refiner").check_base({"text_encoder": NOTHING, "text_encoder_2": TEXT})


def test_new_family_is_found_by_its_pipelines(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("toy")
    module.FAMILY = replace(export_family("sd15"), name="toy", pipelines=("ToyPipeline",))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "imprompt_export.families.toy", module)
    # The export and the server share this list; patch it where the export has imported it.
    monkeypatch.setattr("imprompt_export.families.NAMES", (*families.NAMES, "toy"))
    assert family_of("ToyPipeline", {}).name == "toy"
    assert family_of("StableDiffusionPipeline", {}).name == "sd15"
