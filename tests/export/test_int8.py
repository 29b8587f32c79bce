"""int8 engines are smaller and close to fp32, and refused or left in fp32 if they are not."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

from bundles import ExportedBundle
from imprompt_export import int8, quality
from imprompt_export.bundle import BundleFile
from imprompt_export.calibration import Arrays
from imprompt_export.checkpoints import load
from imprompt_export.exporter import describe
from imprompt_export.quality import Quality, QualityError, Ratio, check_quality
from imprompt_export.stages import Stages
from imprompt_serving.backends import get_backend
from imprompt_serving.backends.openvino import has_bf16

STEP_NETWORKS = {"unet", "controlnet_depth"}
NETWORKS = STEP_NETWORKS | {"vae_decoder", "image_encoder_plain"}


def engines(made: ExportedBundle) -> dict[str, Path]:
    """Return the file of each engine."""
    models = {
        file.parents[1].name.removeprefix(f"{made.name}_"): file for file in made.repository.glob("*/1/model.xml")
    }
    return models | {file.stem: file for file in made.repository.glob("*_denoiser/1/*.xml")}


def sizes(made: ExportedBundle) -> dict[str, int]:
    """Return the bytes of the weights of each engine."""
    return {name: file.with_suffix(".bin").stat().st_size for name, file in engines(made).items()}


def test_the_slowest_networks_become_smaller(bundle: Callable[[str], ExportedBundle]) -> None:
    fp32, int8 = sizes(bundle("openvino")), sizes(bundle("int8"))
    assert int8.keys() == fp32.keys() > NETWORKS
    assert {name for name in fp32 if int8[name] != fp32[name]} == NETWORKS
    assert all(int8[name] < 0.5 * fp32[name] for name in NETWORKS)


def test_quality_is_measured_and_checked(bundle: Callable[[str], ExportedBundle]) -> None:
    report = json.loads(Path(bundle("int8").repository, "int8/export.json").read_text())
    rows = {row.engine: row for row in msgspec.convert(report["quality"], list[Quality])}
    assert rows.keys() == NETWORKS
    calls = {name: row.calls for name, row in rows.items()}
    assert calls == {"unet": 6, "controlnet_depth": 6, "vae_decoder": 1, "image_encoder_plain": 1}
    for row in rows.values():
        assert row.used
        assert row.min_snr_db == (10 if row.engine in STEP_NETWORKS else 20)
        assert row.min_snr_db < row.worst_snr_db <= row.snr_db < 60  # above 60 dB it would not be int8
    assert rows["unet"].snr_db > 16.5  # it is 15 if attention to prompts is int8 too
    assert rows["unet"].picture_distance > 0
    check_quality([*rows.values()])
    strict = [msgspec.structs.replace(row, min_snr_db=60.0) for row in rows.values()]
    message = rf"unet in int8: .* {rows['unet'].snr_db:.1f} dB .* engine.min_snr_db is 60"
    with pytest.raises(QualityError, match=message):
        check_quality(strict)
    check_quality([msgspec.structs.replace(row, used=False) for row in strict])


def test_pictures_that_are_not_finite_are_flagged(bundle: Callable[[str], ExportedBundle]) -> None:
    """Activations in int8 have no infinity and no NaN."""
    latents = np.random.default_rng(0).standard_normal((3, 4, 8, 8)).astype(np.float32)
    latents[1, 0, 3, 3], latents[2] = np.nan, np.inf
    decoder = get_backend("openvino").load(engines(bundle("int8"))["vae_decoder"])
    assert decoder.run({"latents": latents})["finite"].astype(bool).tolist() == [[True], [False], [False]]


def test_only_networks_of_a_step_are_quantized_at_any_cost(
    bundle: Callable[[str], ExportedBundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others stay in fp32 below 20 dB, or below `min_snr_db` if that is more."""
    made = bundle("openvino")
    description = BundleFile.load(made.checkpoints / "bundle.toml")
    files = engines(made)
    other = files["image_projection_plain"]
    monkeypatch.setattr(int8, "quantize", lambda file, samples, smoothing: other)
    monkeypatch.setattr(int8, "picture_distance", lambda one, another: 0.0)
    monkeypatch.setattr(int8, "CalibrationRunner", FakeRunner)
    ratio = Ratio(15.0, 12.0)
    monkeypatch.setattr(quality, "signal_to_noise", lambda name, references, answers: ratio)
    checkpoints = load(description)
    spec = describe(description, checkpoints)

    def quantize(min_snr_db: float) -> tuple[dict[str, Path], set[str]]:
        chosen, rows = int8.quantize_bundle(spec, checkpoints, files, min_snr_db, Stages())
        return chosen, {row.engine for row in rows if row.used}

    chosen, used = quantize(10.0)
    assert used == STEP_NETWORKS
    assert chosen == files | dict.fromkeys(STEP_NETWORKS, other)
    ratio = Ratio(25.0, 12.0)
    chosen, used = quantize(10.0)
    assert used == NETWORKS
    assert chosen == files | dict.fromkeys(NETWORKS, other)
    assert quantize(26.0)[1] == STEP_NETWORKS  # which check_quality refuses


def test_int8_is_compared_with_fp32_although_calibration_may_round(
    bundle: Callable[[str], ExportedBundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Networks that are not quantized are exact, so they have been compared with themselves in the same precision."""
    made = bundle("openvino")
    description = BundleFile.load(made.checkpoints / "bundle.toml")
    files, checkpoints = engines(made), load(description)
    calls: dict[str, int] = {}

    def quantize(file: Path, samples: Sequence[Arrays], smoothing: float) -> Path:
        calls[file.parents[1].name if file.stem == "model" else file.stem] = len(samples)
        return file

    monkeypatch.setattr(int8, "quantize", quantize)
    chosen, rows = int8.quantize_bundle(describe(description, checkpoints), checkpoints, files, 10.0, Stages())
    assert chosen == files
    assert {(row.snr_db, row.picture_distance) for row in rows} == {(math.inf, 0.0)}
    assert calls == {
        "unet": 18,
        "controlnet_depth": 5,
        "openvino_vae_decoder": 4,
        "openvino_image_encoder_plain": 3,
    }


def test_ranges_are_collected_in_bf16_where_that_is_faster(
    bundle: Callable[[str], ExportedBundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NNCF runs the network once before smoothing, and once after it."""
    file = tmp_path / "vae_decoder/vae_decoder.xml"
    file.parent.mkdir()
    for suffix in (".xml", ".bin"):
        shutil.copyfile(engines(bundle("openvino"))["vae_decoder"].with_suffix(suffix), file.with_suffix(suffix))
    monkeypatch.setenv("NNCF_CI", "1")  # otherwise NNCF reports its use over the network
    from nncf.openvino import engine

    in_fp32: list[bool] = []

    class Engine(engine.OVNativeEngine):
        def __init__(self, model: object, use_fp32_precision: bool = True) -> None:
            in_fp32.append(use_fp32_precision)
            super().__init__(model, use_fp32_precision)

    monkeypatch.setattr(engine, "OVNativeEngine", Engine)
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
    for smoothing, count in ((-1.0, 1), (int8.SMOOTHING, 2)):
        in_fp32.clear()
        int8.quantize(file, [{"latents": latents}], smoothing)
        assert in_fp32 == count * [not has_bf16()]


class FakeRunner:
    """Makes no pictures and records no calls."""

    def __init__(self, *arguments: object) -> None: ...

    def encode(self, *arguments: object) -> dict[str, object]:
        return {}

    def encode_pictures(self, *arguments: object) -> dict[str, object]:
        return {}

    def picture(self, *arguments: object) -> np.ndarray:
        return np.zeros((1, 1, 3), np.uint8)

    pictures = picture
