"""Stacking rows of jobs into the inputs of a call, padded to the numbers of rows that an engine runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from imprompt_bench.rig import Rig, sd15
from imprompt_serving import tensor_names
from imprompt_serving.backends.padding import PaddedEngine, warm_up
from imprompt_serving.denoiser.batch import Batcher, RowSlice, _repeat_tokens, stack
from imprompt_serving.denoiser.image_prompts import PADDING_BIAS
from imprompt_serving.specs import CallRows, Shapes
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


class Prompted:
    """One row of a job with an image prompt of `groups` groups of `tokens` tokens, whose values are all 1."""

    frames = 1

    def __init__(self, groups: int, tokens: int, levels: tuple[int, ...]) -> None:
        shapes = {
            "encoder_hidden_states": (77, 8),
            tensor_names.ip_tokens("plain"): (groups, tokens, 8),
            tensor_names.ip_bias("plain"): (groups, tokens),
            tensor_names.ip_scale("plain"): (groups, 16),
            **{tensor_names.ip_mask("plain", level): (groups, 4) for level in levels},
        }
        self._conditioning = {name: torch.ones(1, *shape) for name, shape in shapes.items()}

    def conditioning(self) -> dict[str, torch.Tensor]:
        return self._conditioning

    def model_input(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(1, 4, 8, 8), torch.zeros(1)

    def blocks(self, start: int, stop: int) -> list[Any]:
        return [SimpleNamespace(conditioning=slice(start, stop), window=None)]


def test_image_prompts_of_different_sizes_share_a_call() -> None:
    """Padding tokens are taken out of the softmax, and padding groups have scale 0."""
    bundle = msgspec.structs.replace(sd15(rows=8, adapters=("plain",)), shapes=Shapes(image_tokens=(4, 16)))
    jobs: list[Any] = [Prompted(1, 3, bundle.levels), Prompted(2, 5, bundle.levels)]
    inputs = Batcher(bundle, CallRows(8)).inputs([RowSlice(job, 0, 1) for job in jobs])
    tokens, bias, scale, mask = (
        inputs[name]
        for name in (
            tensor_names.ip_tokens("plain"),
            tensor_names.ip_bias("plain"),
            tensor_names.ip_scale("plain"),
            tensor_names.ip_mask("plain", 0),
        )
    )
    assert tokens.shape == (2, 2, 16, 8)
    assert tokens.sum(dim=(2, 3)).tolist() == [[24, 0], [40, 40]]
    assert (bias == 1).sum(dim=2).tolist() == [[3, 0], [5, 5]]
    assert set(bias.unique().tolist()) == {1, PADDING_BIAS}
    assert scale.sum(dim=2).tolist() == [[16, 0], [16, 16]]
    assert mask.sum(dim=2).tolist() == [[4, 0], [4, 4]]


def test_rows_without_image_prompts_keep_their_single_token() -> None:
    bundle = sd15(rows=8, adapters=("plain",))
    job: Any = Prompted(1, 1, bundle.levels)
    inputs = Batcher(bundle, CallRows(8)).inputs([RowSlice(job, 0, 1)])
    assert inputs[tensor_names.ip_tokens("plain")].shape == (1, 1, 1, 8)


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
