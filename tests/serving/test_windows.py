"""Windows of long clips: complete, of one length, moving; and how they are put together."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from imprompt_serving.denoiser.windows import frames_of, merge, pyramid, windows
from imprompt_serving.job_request import ContextWindow


@pytest.mark.parametrize("frames", [1, 7, 16])
def test_a_clip_within_the_window_is_one(frames: int) -> None:
    assert windows(3, frames, ContextWindow(length=16)) == [range(frames)]


@pytest.mark.parametrize("frames", [17, 24, 64, 65])
@pytest.mark.parametrize(
    "context", [ContextWindow(length=16), ContextWindow(length=8, overlap=0), ContextWindow(length=8, stride=3)]
)
def test_windows_have_one_length_and_cover_the_clip(frames: int, context: ContextWindow) -> None:
    for step in range(12):
        found = windows(step, frames, context)
        assert {len(window) for window in found} == {context.length}
        assert set().union(*found) == set(range(frames))
        assert len(set(found)) == len(found)
        assert all(a < b for window in found for a, b in pairwise(window))


def test_neighbours_share_frames() -> None:
    ordered = windows(0, 64, ContextWindow(length=16, overlap=4))
    shared = [len(set(a) & set(b)) for a, b in pairwise(ordered)]
    assert min(shared) >= 4


def test_seams_move_from_step_to_step() -> None:
    starts = {tuple(window[0] for window in windows(step, 64, ContextWindow(length=16))) for step in range(8)}
    assert len(starts) == 8


def test_strides_look_at_a_wider_part() -> None:
    steps = {window[1] - window[0] for window in windows(0, 64, ContextWindow(length=16, stride=3))}
    assert steps == {1, 2, 4}


def test_one_window_merges_to_itself() -> None:
    noise = torch.randn(2, 4, 6, 3, 3)
    torch.testing.assert_close(merge(noise, windows(0, 6, ContextWindow(length=8)), 6), noise)


def test_windows_that_agree_merge_to_what_they_say() -> None:
    whole = torch.randn(2, 4, 40, 3, 3)
    views = windows(5, 40, ContextWindow(length=16))
    parts = torch.cat([frames_of(whole, window, 2) for window in views])
    torch.testing.assert_close(merge(parts, views, 40), whole)


def test_frames_are_those_of_the_window() -> None:
    clip = torch.arange(40.0)[None, None]
    for step in range(4):
        for window in windows(step, 40, ContextWindow(length=8, stride=3)):
            assert frames_of(clip, window, 2).flatten().tolist() == list(window)


def test_the_middle_of_a_window_counts_most() -> None:
    assert pyramid(5).tolist() == [1, 2, 3, 2, 1]
    assert pyramid(4).tolist() == [1, 2, 2, 1]
