"""Tokenizing and encoding prompts, with a fake text encoder."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import msgspec
import numpy as np
import pytest

from imprompt_bench import rig
from imprompt_serving.pipeline.encode_text import TextPromptEncoder
from imprompt_serving.pipeline.models import Tensors
from imprompt_serving.pipeline.request import parse
from imprompt_serving.pipeline.stages import Stages
from imprompt_serving.pipeline.text import Chunk, PromptTokenizer
from tiny.tokenizer import VOCABULARY_SIZE, write_tokenizer

BUNDLE = rig.sd15(rows=2)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PromptTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder).backend_tokenizer.save(str(folder / "text_encoder.tokenizer.json"))
    spec = msgspec.structs.replace(BUNDLE.text_encoders[0], pad_token_id=VOCABULARY_SIZE - 1)
    return PromptTokenizer(folder, spec)


@pytest.mark.parametrize(
    ("prompt", "rest"),
    [
        ("", ""),
        ("a " * 75, ""),
        ("a " * 75 + "A Cat", "A Cat"),
        ("É " * 30 + "a  \n" * 10 + "a " * 10 + "\x00猫 end", None),
        ("a " * 200 + "end", "a " * 125 + "end"),
    ],
)
def test_tokenizer_returns_the_part_that_does_not_fit(
    tokenizer: PromptTokenizer, prompt: str, rest: str | None
) -> None:
    (chunk,), cut = tokenizer.chunks(prompt, 1)
    assert chunk.ids.shape == (1, 77)
    if rest is not None:
        assert cut == rest
    if cut:  # as many tokens as fit, and no more
        assert prompt.endswith(cut)
        (fitting,), _ = tokenizer.chunks(prompt[: -len(cut)], 1)
        assert np.array_equal(fitting.ids, chunk.ids)


class Encoder:
    """Replaces the text encoder; responds at once."""

    async def call(self, model: str, tensors: Mapping[str, np.ndarray]) -> Tensors:
        return {"hidden_states": np.zeros((1, 77, 768), np.float32)}

    def stream(self, model: str, tensors: Mapping[str, np.ndarray]) -> AsyncIterator[Tensors]:
        raise NotImplementedError


def test_tokenizing_does_not_block_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        def __init__(self, *_: object) -> None:
            pass

        def chunks(self, prompt: str, most: int) -> tuple[list[Chunk], str]:
            if prompt:
                time.sleep(0.3)
            return [Chunk(np.zeros((1, 77), np.int64))], ""

    monkeypatch.setattr("imprompt_serving.pipeline.encode_text.PromptTokenizer", Slow)
    request = parse({"prompt": np.array([b"a"], object)}, BUNDLE)

    async def longest_pause() -> float:
        encoder = TextPromptEncoder(BUNDLE, Path(), Encoder())
        work = asyncio.ensure_future(encoder.encode(request, Stages(), set()))
        longest, last = 0.0, time.perf_counter()
        while not work.done():
            await asyncio.sleep(0.005)
            longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
        return longest

    assert asyncio.run(longest_pause()) < 0.2
