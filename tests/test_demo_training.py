"""A training run that starts from the embedded bundle begins with exactly its weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from imprompt_demo import bundle_path
from imprompt_demo.train.publish import publish
from imprompt_demo.train.start import start


def test_a_run_that_starts_from_the_bundle_publishes_it_unchanged(tmp_path: Path) -> None:
    start(bundle_path(), tmp_path)
    publish(tmp_path, tmp_path / "bundle")
    for name in ("bundle.toml", "bundle-lcm.toml"):
        assert (tmp_path / "bundle" / name).read_text() == (bundle_path() / name).read_text()
    files = sorted(file.relative_to(bundle_path()) for file in bundle_path().rglob("*.safetensors"))
    assert sorted(file.relative_to(tmp_path / "bundle") for file in tmp_path.rglob("*.safetensors")) == files
    for file in files:
        expected, found = load_file(bundle_path() / file), load_file(tmp_path / "bundle" / file)
        assert expected.keys() == found.keys(), file
        for key, value in expected.items():
            assert found[key].dtype == value.dtype == torch.float16, (file, key)
            assert torch.equal(found[key], value), (file, key)
