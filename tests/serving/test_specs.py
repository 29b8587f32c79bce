"""A bundle's description as it is kept beside its models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from imprompt_bench.rig import sd15
from imprompt_serving.specs import FILE_NAME, Bundle


def test_a_bundle_is_read_as_it_was_written(tmp_path: Path) -> None:
    bundle = sd15(rows=4, adapters=("plain",))
    bundle.save(tmp_path)
    assert Bundle.load(tmp_path) == bundle


def test_a_bundle_of_another_version_says_what_to_do(tmp_path: Path) -> None:
    sd15(rows=4).save(tmp_path)
    content = json.loads((tmp_path / FILE_NAME).read_text())
    del content["preview_factors"]
    (tmp_path / FILE_NAME).write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"bundle\.json is of another version .* export the bundle again: .*preview_factors"
    ):
        Bundle.load(tmp_path)
