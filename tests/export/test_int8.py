"""int8: quantized from the bundle's own denoising runs, smaller, close to fp32, and refused when it is not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bundles import Made
from imprompt_export.bundle import BundleFile
from imprompt_export.checkpoints import load
from imprompt_export.int8 import Quality, QualityError, check_quality, quantize_bundle
from imprompt_serving.specs import Bundle

NETWORKS = {"unet", "controlnet_depth"}


@pytest.fixture(scope="module")
def fp32(bundle: Callable[[str], Made], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The engines of the denoiser of a bundle for OpenVINO."""
    folder = tmp_path_factory.mktemp("engines") / "fp32"
    shutil.copytree(bundle("openvino").repository / "openvino_denoiser/1", folder)
    return {file.stem: file for file in folder.glob("*.xml")}


@pytest.fixture(scope="module")
def int8(bundle: Callable[[str], Made], fp32: dict[str, Path]) -> tuple[dict[str, Path], list[Quality]]:
    made = bundle("openvino")
    checkpoints = load(BundleFile.load(made.checkpoints / "bundle.toml"))
    spec = Bundle.load(made.repository / "openvino_denoiser/1")
    return quantize_bundle(spec, checkpoints, fp32, 10.0)


def test_the_networks_of_a_step_become_small(fp32: dict[str, Path], int8: Any) -> None:
    def size(file: Path) -> int:
        return file.with_suffix(".bin").stat().st_size

    files, _ = int8
    assert files.keys() == fp32.keys() > NETWORKS
    assert {name for name, file in files.items() if file != fp32[name]} == NETWORKS
    for name in NETWORKS:
        assert size(files[name]) < 0.5 * size(fp32[name])


def test_quality_is_measured_and_judged(int8: Any) -> None:
    _, rows = int8
    assert {row.engine for row in rows} == NETWORKS
    for row in rows:
        assert 8 <= row.calls <= 10
        assert 10 < row.worst_snr_db <= row.snr_db < 60  # not exact: it is another arithmetic
    assert rows[0].engine == "unet"
    assert rows[0].snr_db > 16.5  # 15 with attention to prompts in int8
    assert rows[0].picture_distance > 0
    check_quality(rows)
    strict = [msgspec.structs.replace(row, min_snr_db=60.0) for row in rows]
    with pytest.raises(QualityError, match=rf"unet in int8: .* {rows[0].snr_db:.1f} dB .* engine.min_snr_db is 60"):
        check_quality(strict)
