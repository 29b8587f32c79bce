"""Prompts with weights, without a server: parts and chunks are those of Stable Diffusion web UI.

The expected values come from a run of its `parse_prompt_attention` and `tokenize_line` with the tiny tokenizer.
"""

from __future__ import annotations

import time
from itertools import groupby
from typing import Any

import msgspec
import pytest

from imprompt_bench import rig
from imprompt_serving.pipeline.prompt_syntax import parse_weights
from imprompt_serving.pipeline.text import Chunk, PromptTokenizer
from tiny.tokenizer import VOCABULARY_SIZE, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PromptTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder).backend_tokenizer.save(str(folder / "text_encoder.tokenizer.json"))
    encoder = msgspec.structs.replace(rig.sd15(rows=2).text_encoders[0], pad_token_id=VOCABULARY_SIZE - 1)
    return PromptTokenizer(folder, encoder)


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("", []),
        ("a cat", [("a cat", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("unbalanced) [", [("unbalanced) ", 1.0)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
        ("(red: 1.5 ) 4:3 :2)", [("red", 1.5), (" 4:3 :2)", 1.0)]),
        ("a BREAK  BREAK BREAKS", [("a", 1.0), ("BREAK", 1.0), ("BREAK", 1.0), ("BREAKS", 1.0)]),
    ],
)
def test_parts(prompt: str, parts: list[tuple[str, float]]) -> None:
    found = parse_weights(prompt)
    assert [part.text for part in found] == [text for text, _ in parts]
    assert [part.weight for part in found] == pytest.approx([weight for _, weight in parts])


@pytest.mark.parametrize("prompt", ["(a:1.2.3)", "(a:1000)", "(" * 65 + "a", "(((a:9):9):9)"])
def test_invalid_weights(prompt: str) -> None:
    with pytest.raises(ValueError, match=r"weight|brackets"):
        parse_weights(prompt)


@pytest.mark.parametrize(
    "prompt", [" " * 60000, "(a)" * 20000, "(a [b" * 30 + "]a)" * 10000, ": " * 30000, "BREAK " * 9000]
)
def test_time_is_proportional_to_the_length(prompt: str) -> None:
    started = time.process_time()
    parse_weights(prompt)
    assert time.process_time() - started < 2.0


def runs(chunk: Chunk) -> list[tuple[int, float]]:
    """Return the weights of the tokens between start and end token, as numbers of equal ones."""
    ids = chunk.ids[0].tolist()
    count = ids.index(VOCABULARY_SIZE - 1) - 1
    weights = [1.0] * count if chunk.weights is None else chunk.weights[1 : count + 1].round(4).tolist()
    return [(len(list(group)), weight) for weight, group in groupby(weights)]


@pytest.mark.parametrize(
    ("prompt", "chunks"),
    [
        ("", [[]]),
        ("an (important) word", [[(1, 1.0), (5, 1.1), (3, 1.0)]]),
        (r"a (red: 1.5 ) [blue] \(hat\) BREAK (snow:0.5)", [[(1, 1.0), (1, 1.5), (1, 0.9091), (3, 1.0)], [(4, 0.5)]]),
        ("a " * 76, [[(75, 1.0)], [(1, 1.0)]]),
        ("a " * 60 + ", " + "dog " * 20, [[(61, 1.0)], [(20, 1.0)]]),  # breaks after the comma
        ("(a dog:1.2), " * 30, [[(2, 1.2), (1, 1.0)] * 25, [(2, 1.2), (1, 1.0)] * 5]),
        ("BREAK a BREAK BREAK b BREAK", [[], [(1, 1.0)], [], [(1, 1.0)]]),
    ],
)
def test_chunks(tokenizer: PromptTokenizer, prompt: str, chunks: list[Any]) -> None:
    found, rest = tokenizer.weighted_chunks(prompt, 8)
    assert not rest
    assert [[(count, pytest.approx(weight, abs=1e-3)) for count, weight in runs(chunk)] for chunk in found] == chunks


def test_rest_of_a_weighted_prompt(tokenizer: PromptTokenizer) -> None:
    found, rest = tokenizer.weighted_chunks("a " * 74 + "(red:1.2) BREAK (the:1.3) end", 1)
    assert len(found) == 1
    assert rest == "the end"
    assert tokenizer.weighted_chunks("a " * 74 + "(red cat:1.2)", 1)[1] == "cat"
