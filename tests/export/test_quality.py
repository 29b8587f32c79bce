"""Signal-to-noise ratios of quantized networks."""

from __future__ import annotations

import numpy as np
import pytest

from imprompt_export.quality import signal_to_noise

RNG = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def test_ratios_are_in_decibels_over_all_calls_and_of_the_worst() -> None:
    exact = [np.full((1, 4), 10, np.float32), np.full((1, 4), 10, np.float32)]
    answers = [exact[0] + 1, exact[1] + 0.1]
    ratio = signal_to_noise("net", [{"out": x} for x in exact], [{"out": x} for x in answers])
    assert ratio.worst_snr_db == pytest.approx(20, abs=1e-3)
    assert ratio.snr_db == pytest.approx(10 * np.log10(200 / 1.01), abs=1e-3)
    assert signal_to_noise("net", [{"out": exact[0]}], [{"out": exact[0]}]).snr_db == np.inf


def test_unet_is_judged_by_its_guided_prediction() -> None:
    """Errors that both branches share do not grow with guidance, others do."""
    exact, error = noise(1, 4, 8, 8), 0.01 * noise(1, 4, 8, 8)
    both = np.concatenate([exact, exact])
    shared = signal_to_noise("unet", [{"noise_pred": both}], [{"noise_pred": both + error}])
    opposite = signal_to_noise("unet", [{"noise_pred": both}], [{"noise_pred": both + np.concatenate([error, -error])}])
    assert shared.snr_db == pytest.approx(40, abs=1)
    assert opposite.snr_db == pytest.approx(40 - 20 * np.log10(14), abs=1)


def test_pictures_are_compared_by_their_distance_from_gray() -> None:
    """Otherwise an error would matter less in a bright picture."""
    exact = np.where(noise(1, 8, 8, 3) > 0, 227, 28).astype(np.uint8)
    wrong = exact.astype(int) + np.where(exact > 127, -10, 10)
    reference = {"images": exact, "finite": np.array([[True]])}
    ratio = signal_to_noise("vae_decoder", [reference], [reference | {"images": wrong.astype(np.uint8)}])
    assert ratio.snr_db == pytest.approx(20, abs=0.1)


@pytest.mark.parametrize(("name", "expected"), [("image_encoder_plain", 20.0), ("controlnet_depth", 40.0)])
def test_worst_output_counts_but_residuals_are_one_output(name: str, expected: float) -> None:
    """The larger output of an image encoder must not hide errors in the smaller one."""
    small, large = np.full((1, 100), 1, np.float32), np.full((1, 100), 10, np.float32)
    reference = {"image_embeds": small, "hidden_states": large}
    ratio = signal_to_noise(name, [reference], [{"image_embeds": small + 0.1, "hidden_states": large}])
    assert ratio.snr_db == pytest.approx(expected, abs=0.1)
