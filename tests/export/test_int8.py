"""int8 engines are smaller and close to fp32, and refused if they are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from bundles import ExportedBundle
from imprompt_export.quality import Quality, QualityError, check_quality

NETWORKS = {"unet", "controlnet_depth"}


def sizes(made: ExportedBundle) -> dict[str, int]:
    """Return the bytes of the weights of each engine in the denoiser."""
    folder = made.repository / f"{made.name}_denoiser/1"
    return {file.stem: file.with_suffix(".bin").stat().st_size for file in folder.glob("*.xml")}


def test_step_networks_become_smaller(bundle: Callable[[str], ExportedBundle]) -> None:
    fp32, int8 = sizes(bundle("openvino")), sizes(bundle("int8"))
    assert int8.keys() == fp32.keys() > NETWORKS
    assert {name for name in fp32 if int8[name] != fp32[name]} == NETWORKS
    assert all(int8[name] < 0.5 * fp32[name] for name in NETWORKS)


def test_quality_is_measured_and_checked(bundle: Callable[[str], ExportedBundle]) -> None:
    report = json.loads(Path(bundle("int8").repository, "int8/export.json").read_text())
    rows = msgspec.convert(report["quality"], list[Quality])
    assert {row.engine for row in rows} == NETWORKS
    for row in rows:
        assert 8 <= row.calls <= 10
        assert 10 < row.worst_snr_db <= row.snr_db < 60  # above 60 dB it would not be int8
    assert rows[0].engine == "unet"
    assert rows[0].snr_db > 16.5  # it is 15 if attention to prompts is int8 too
    assert rows[0].picture_distance > 0
    check_quality(rows)
    strict = [msgspec.structs.replace(row, min_snr_db=60.0) for row in rows]
    with pytest.raises(QualityError, match=rf"unet in int8: .* {rows[0].snr_db:.1f} dB .* engine.min_snr_db is 60"):
        check_quality(strict)
