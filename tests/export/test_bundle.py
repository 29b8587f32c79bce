"""Bundle files and checkpoints that do not fit are refused by name, before anything is exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from imprompt_export import BundleError, BundleFile
from imprompt_export.adapters import kind_of, read
from imprompt_export.checkpoints import load
from tiny import adapters, base

BASE = 'name = "tiny"\nbase = "base"\n'
ADAPTER = """
[[ip_adapter]]
name = "plain"
path = "ip"
subfolder = "models"
weight_name = "ip-adapter_sd15.safetensors"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SD1.5 base with adapters of both families and both encoders."""
    root = tmp_path_factory.mktemp("checkpoints")
    base.make_sd15(root / "base")
    for family, encoder in (("models", "vit_h"), ("sdxl_models", "big_g")):
        adapters.make_image_encoder(root / "ip" / family / "image_encoder", kind=encoder)
    for family in ("sd15", "sdxl"):
        adapters.make_adapter(root / "ip", "plain", family=family)
    adapters.make_adapter(root / "ip", "plus")
    return root


def write(folder: Path, text: str) -> Path:
    file = folder / "bundle.toml"
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BASE + "colour = 3", "colour"),
        (BASE + ADAPTER + "scale = 0.5", "scale"),
        (BASE + '[engine]\nbackend = "abacus"', "'abacus' is none of onnxruntime, "),
        (
            BASE + '[engine]\nprecision = "int8"',
            r"engine.precision \(with onnxruntime\): 'int8' is none of fp32, fp16",
        ),
        (BASE + '[engine]\nbackend = "openvino"\nhost = "native"', "engine.host"),
        (BASE + "[engine]\nthreads = -1", "engine.threads"),
        (BASE + "[engine]\ndevices = [0, 0]", "engine.devices.*each once"),
        (BASE + "[engine]\ndevices = [-1]", "engine.devices"),
        (BASE + '[engine]\nprecision = "fp4"', "engine.precision.*fp4.*fp32, fp16, bf16"),
        (BASE + '[engine]\nbackend = "tensorrt_rtx"\nhost = "native"', "engine.host.*tensorrt_rtx.*none of python"),
        (BASE + "[engine]\nrefit = true", "engine.refit.*onnxruntime"),
        (BASE + '[engine]\ntargets = ["8.9"]', "engine.targets.*SM89"),
        (BASE + "[shapes]\nregions = 0", "shapes.regions"),
        (BASE + "[shapes]\nheight = [512, 64, 1024]", "shapes.height"),
        (BASE + "[shapes]\nwidth = [60, 64, 64]", "multiples of 8"),
        (BASE + "[shapes]\nrows = [1, 2]", "rows"),
        (BASE + "[shapes]\nimage_tokens = [16, 4]", "image_tokens"),
        (BASE.replace("tiny", "Tiny"), "name"),
        (BASE.replace("tiny", "up"), "name"),
        ('name = "tiny"', "base"),
        (BASE + ADAPTER + ADAPTER, "differ"),
        (BASE + ADAPTER.replace("ip-adapter_sd15", "nothing"), "nothing.safetensors"),
        (BASE + ADAPTER + 'image_encoder_folder = "elsewhere"', "elsewhere"),
        (BASE.replace('"base"', '"./nowhere"'), "nowhere"),
        ("name = ", "TOML"),
    ],
)
def test_bundle_files_are_checked(folder: Path, text: str, said: str) -> None:
    with pytest.raises(BundleError, match=said):
        load(BundleFile.load(write(folder, text)))


def test_a_missing_bundle_file() -> None:
    with pytest.raises(BundleError, match=r"nowhere\.toml"):
        BundleFile.load("nowhere.toml")


def test_an_adapter_of_another_family_is_refused_with_both_widths(folder: Path) -> None:
    text = BASE + ADAPTER.replace("models", "sdxl_models").replace("ip-adapter_sd15", "ip-adapter_sdxl")
    with pytest.raises(BundleError, match=r"17 attention layers of width 128.*10 of width 48"):
        load(BundleFile.load(write(folder, text)))


def test_an_adapter_with_the_wrong_encoder_is_refused_with_both_widths(folder: Path) -> None:
    text = BASE + ADAPTER + 'image_encoder_folder = "sdxl_models/image_encoder"'
    with pytest.raises(BundleError, match=r"width 64.*gives 80.*ViT-H"):
        load(BundleFile.load(write(folder, text)))


def test_a_bin_file_that_would_run_code_is_refused(folder: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (print, ("ran",))

    torch.save({"image_proj": Malicious(), "ip_adapter": {}}, folder / "ip/models/bad.bin")
    with pytest.raises(BundleError, match="plain tensors"):
        read(folder / "ip/models/bad.bin")


def test_both_file_formats_hold_the_same(folder: Path) -> None:
    first = read(adapters.make_adapter(folder / "two", "plus", weight_name="a.bin"))
    second = read(adapters.make_adapter(folder / "two", "plus", weight_name="a.safetensors"))
    assert kind_of(first, "a") == kind_of(second, "a") == "plus"
    for part in first:
        assert first[part].keys() == second[part].keys()
        assert all(torch.equal(first[part][key], second[part][key]) for key in first[part])


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("plain", "plain"),
        ("light", "plain"),
        ("plus", "plus"),
        ("plus_face", "plus"),
        ("full_face", "full_face"),
        ("faceid", "faceid"),
        ("faceid_portrait", "faceid"),
        ("faceid_plus", "faceid_plus"),
        ("faceid_plusv2", "faceid_plusv2"),
    ],
)
def test_kinds_are_told_apart(tmp_path: Path, kind: adapters.Kind, found: str) -> None:
    file = adapters.make_adapter(tmp_path, kind)
    assert kind_of(read(file), file.name) == found
