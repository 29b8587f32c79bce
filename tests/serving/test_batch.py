"""Stacking rows of jobs into the inputs of a call, padded to the numbers of rows that an engine runs."""

from __future__ import annotations

import pytest
import torch

from imprompt_bench.rig import Rig, sd15
from imprompt_serving.backends.padding import PaddedEngine, warm_up
from imprompt_serving.denoiser.batch import Batcher, RowSlice, _repeat_tokens, stack
from imprompt_serving.specs import CallRows
from serving.test_job import Half


def rig() -> Rig:
    return Rig(sd15(rows=8, adapters=("plain",)), Half(), bucketed=True)


@pytest.mark.parametrize(("jobs", "rows"), [(1, 2), (2, 4), (3, 8), (4, 8)])
def test_calls_are_padded_to_a_bucket(jobs: int, rows: int) -> None:
    """The last row of every input is repeated, and the other rows do not change."""
    room = rig()
    parts = [RowSlice(room.job(str(seed), steps=2, size=64, seed=seed), 0, 2) for seed in range(jobs)]
    padded = Batcher(room.bundle, CallRows(8, bucketed=True)).inputs(parts)
    plain = Batcher(room.bundle, CallRows(8)).inputs(parts)
    assert {len(tensor) for tensor in padded.values()} == {rows}
    for name, tensor in plain.items():
        assert torch.equal(padded[name][: len(tensor)], tensor), name
        assert all(torch.equal(row, tensor[-1]) for row in padded[name][len(tensor) :]), name
    room.denoiser.stop()


def test_padding_changes_no_picture() -> None:
    """Three jobs of two rows each have the same latents together as alone."""
    room = rig()
    alone = [room.submit(room.job("alone", steps=3, size=64, seed=seed))() for seed in range(3)]
    waits = [room.submit(room.job(str(seed), steps=3, size=64, seed=seed)) for seed in range(3)]
    for wait, expected in zip(waits, alone, strict=True):
        assert torch.equal(wait(), expected)
    room.denoiser.stop()


def test_texts_are_padded_by_repeating_their_tokens() -> None:
    """The softmax of repeated tokens is that of the tokens. Short texts get at least the usual length."""
    generator = torch.Generator().manual_seed(0)
    short, usual, long = (torch.randn(2, tokens, 8, generator=generator) for tokens in (25, 50, 200))
    padded = _repeat_tokens([short, usual, long], 77)
    assert [tensor.shape[1] for tensor in padded] == [200] * 3
    assert padded[2] is long
    query = torch.randn(2, 5, 8, generator=generator)
    for text, repeated in ((short, padded[0]), (usual, padded[1])):
        expected = torch.nn.functional.scaled_dot_product_attention(query, text, text)
        found = torch.nn.functional.scaled_dot_product_attention(query, repeated, repeated)
        torch.testing.assert_close(found, expected)
    assert [tensor.shape[1] for tensor in _repeat_tokens([short], 77)] == [100]


def test_rows_of_one_job_are_not_copied() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    assert stack([tensor], 2) is tensor
    assert torch.equal(stack([tensor, tensor + 9], 5), torch.cat([tensor, tensor + 9, tensor[1:] + 9]))


class Doubling:
    def __init__(self) -> None:
        self.rows: list[int] = []

    def run(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.rows.append(len(tensors["x"]))
        return {"y": tensors["x"] * 2}


def test_engines_outside_of_the_loop_are_padded_too() -> None:
    engine, rows = Doubling(), CallRows(6, bucketed=True)
    padded = PaddedEngine(engine, rows)
    for count in (1, 3, 5, 6, 9):
        x = torch.arange(2.0 * count).reshape(count, 2).numpy()
        assert (padded.run({"x": x})["y"] == 2 * x).all()
    assert engine.rows == [1, 4, 6, 6, 9]
    warm_up(padded, {"x": torch.ones(1, 2).numpy()}, rows)
    assert engine.rows[5:] == [1, 2, 4, 6]
