"""A bundle's description on disk, and the rows of its calls."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from imprompt_bench.rig import sd15
from imprompt_serving.specs import FILE_NAME, Bundle, CallRows


def test_bundle_survives_a_round_trip(tmp_path: Path) -> None:
    bundle = sd15(rows=4, adapters=("plain",))
    bundle.save(tmp_path)
    assert Bundle.load(tmp_path) == bundle


def test_bundle_from_another_version_says_what_to_do(tmp_path: Path) -> None:
    sd15(rows=4).save(tmp_path)
    content = json.loads((tmp_path / FILE_NAME).read_text())
    del content["preview_factors"]
    (tmp_path / FILE_NAME).write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"bundle\.json was written by another version .* export the bundle again: .*preview_factors"
    ):
        Bundle.load(tmp_path)


@pytest.mark.parametrize(
    ("most", "buckets"),
    [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8)), (16, (1, 2, 4, 8, 16)), (17, (1, 2, 4, 8, 16, 17))],
)
def test_call_rows_pad_to_the_next_bucket(most: int, buckets: tuple[int, ...]) -> None:
    """`padded` rounds up to a bucket and `unpadded` down; without buckets, both keep the number."""
    sizes, any_number = CallRows(most, bucketed=True), CallRows(most)
    assert sizes.buckets == buckets
    for rows in range(1, most + 1):
        assert sizes.padded(rows) == min(bucket for bucket in buckets if bucket >= rows)
        assert sizes.unpadded(rows) == max(bucket for bucket in buckets if bucket <= rows)
        assert any_number.padded(rows) == any_number.unpadded(rows) == rows


def test_row_of_a_clip_counts_as_its_frames() -> None:
    assert CallRows(16, bucketed=True).of_frames(5).buckets == (1, 2, 3)
    assert CallRows(16, bucketed=True).of_frames(32).buckets == (1,)
