"""Windows of long clips cover them, have equal lengths, and move; and their outputs are merged."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from imprompt_serving.denoiser.image_prompts import differs_by_frame, in_window
from imprompt_serving.denoiser.windows import merge, pyramid, select_frames, windows
from imprompt_serving.job_request import ContextWindow


@pytest.mark.parametrize("frames", [1, 7, 16])
def test_a_short_clip_is_a_single_window(frames: int) -> None:
    assert windows(3, frames, ContextWindow(length=16)) == [range(frames)]


@pytest.mark.parametrize("frames", [17, 24, 64, 65])
@pytest.mark.parametrize(
    "context", [ContextWindow(length=16), ContextWindow(length=8, overlap=0), ContextWindow(length=8, stride=3)]
)
def test_windows_have_equal_lengths_and_cover_the_clip(frames: int, context: ContextWindow) -> None:
    for step in range(12):
        found = windows(step, frames, context)
        assert {len(window) for window in found} == {context.length}
        assert set().union(*found) == set(range(frames))
        assert len(set(found)) == len(found)
        assert all(a < b for window in found for a, b in pairwise(window))


def test_neighboring_windows_overlap() -> None:
    ordered = windows(0, 64, ContextWindow(length=16, overlap=4))
    shared = [len(set(a) & set(b)) for a, b in pairwise(ordered)]
    assert min(shared) >= 4


def test_seams_move_from_step_to_step() -> None:
    starts = {tuple(window[0] for window in windows(step, 64, ContextWindow(length=16))) for step in range(8)}
    assert len(starts) == 8


def test_seams_move_by_halves_then_quarters() -> None:
    """Windows begin 12 frames apart, and move by 0, 6, 3, and 9 frames."""
    firsts = [windows(step, 64, ContextWindow(length=16, overlap=4))[1][0] % 12 for step in range(4)]
    assert firsts == [0, 6, 3, 9]


def test_strides_span_more_of_the_clip() -> None:
    steps = {window[1] - window[0] for window in windows(0, 64, ContextWindow(length=16, stride=3))}
    assert steps == {1, 2, 4}


def test_merging_a_single_window_changes_nothing() -> None:
    noise = torch.randn(2, 4, 6, 3, 3)
    torch.testing.assert_close(merge(noise, windows(0, 6, ContextWindow(length=8)), 6), noise)


def test_merging_equal_outputs_changes_nothing() -> None:
    whole = torch.randn(2, 4, 40, 3, 3)
    views = windows(5, 40, ContextWindow(length=16))
    parts = torch.cat([select_frames(whole, window, axis=2) for window in views])
    torch.testing.assert_close(merge(parts, views, 40), whole)


def test_selected_frames_are_those_of_the_window() -> None:
    clip = torch.arange(40.0)[None, None]
    for step in range(4):
        for window in windows(step, 40, ContextWindow(length=8, stride=3)):
            assert select_frames(clip, window, axis=2).flatten().tolist() == list(window)


def test_the_middle_of_a_window_has_the_most_weight() -> None:
    assert pyramid(5).tolist() == [1, 2, 3, 2, 1]
    assert pyramid(4).tolist() == [1, 2, 2, 1]


def test_image_prompts_of_a_window() -> None:
    """Tokens and masks may differ by frame, be the same for all, or have no axis of frames at all."""
    window = range(1, 6, 2)
    by_frame = {
        "ip_tokens_plain": torch.arange(8.0).view(1, 8, 1, 1, 1).expand(2, 8, 3, 4, 6),
        "ip_mask_plain_0": torch.arange(8.0).view(1, 8, 1, 1).expand(2, 8, 3, 16),
    }
    for name, tensor in by_frame.items():
        assert in_window(tensor, name, window).transpose(0, 1).flatten(1)[:, 0].tolist() == [1, 3, 5]
        shared = in_window(tensor[:, 2:3], name, window)
        assert shared.shape == (2, 3, *tensor.shape[2:])
        assert (shared == 2).all()
        without = tensor[:, 0]
        assert in_window(without, name, window) is without
        assert [differs_by_frame(given, name) for given in (tensor, tensor[:, 2:3], without)] == [True, False, False]
    for name in ("ip_bias_plain", "ip_scale_plain"):
        tensor = torch.zeros(2, 3, 4)
        assert in_window(tensor, name, window) is tensor
