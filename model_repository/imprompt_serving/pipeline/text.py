"""Tokenize prompts without transformers: the export writes a `tokenizers` file for each text encoder."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from imprompt_serving.pipeline.embedding_tokens import EmbeddingTokens
from imprompt_serving.pipeline.prompt_syntax import parse_weights
from imprompt_serving.specs import TextEncoder

_COMMA = ",</w>"
_COMMA_REACH = 20
"""Weighted prompts break after a comma that is at most this far from the end of a chunk, as the web UI does by default
(`comma_padding_backtrack`)."""


class Chunk(NamedTuple):
    """The input of a text encoder: token ids [1, length], and the weight of each token [length] if not all are 1."""

    ids: np.ndarray
    weights: np.ndarray | None = None


class _Token(NamedTuple):
    id: int
    weight: float
    part: int
    start: int
    """Where the token starts: the index of its part of the prompt, and the character in it."""


class PromptTokenizer:
    """Splits a prompt into chunks for one text encoder.

    Each chunk has a start token, as many tokens of the prompt as fit, an end token, and padding, like the output of
    `CLIPTokenizer(padding="max_length")`.
    """

    def __init__(self, folder: Path, encoder: TextEncoder) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / f"{encoder.engine}.tokenizer.json"))
        self._embeddings = EmbeddingTokens(self._tokenizer)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._start, self._end = self._tokenizer.encode("").ids
        self._padding, self._length = encoder.pad_token_id, encoder.max_length
        self._comma = self._tokenizer.token_to_id(_COMMA)

    def chunks(self, prompt: str, most: int) -> tuple[list[Chunk], str]:
        """Return the chunks of a prompt, at most `most`, and the part of the prompt that did not fit."""
        prompt = self._embeddings.expand(prompt)
        encoding = self._tokenizer.encode(prompt, add_special_tokens=False)
        size = self._length - 2
        parts = [encoding.ids[first : first + size] for first in range(0, min(len(encoding.ids), most * size), size)]
        rest = prompt[encoding.offsets[most * size][0] :] if len(encoding.ids) > most * size else ""
        return [self._chunk(part) for part in parts or [[]]], rest

    def weighted_chunks(self, prompt: str, most: int) -> tuple[list[Chunk], str]:
        """Return the chunks of a prompt in the web UI's grammar, and the part that did not fit.

        Raises:
            ValueError: the prompt is not valid.
        """
        parts = [part._replace(text=self._embeddings.expand(part.text)) for part in parse_weights(prompt)]
        encodings = self._tokenizer.encode_batch([part.text for part in parts], add_special_tokens=False)
        found: list[list[_Token]] = [[]]
        for index, (part, encoding) in enumerate(zip(parts, encodings, strict=True)):
            if part.is_break:
                found.append([])
                continue
            for token, (start, _) in zip(encoding.ids, encoding.offsets, strict=True):
                self._append(found, _Token(token, part.weight, index, start))
        if len(found) > 1 and not found[-1]:
            found.pop()
        rest = ""
        if first := next(chain.from_iterable(found[most:]), None):
            rest = parts[first.part].text[first.start :] + "".join(part.text for part in parts[first.part + 1 :])
        return [self._weighted(tokens) for tokens in found[:most]], rest

    def _append(self, found: list[list[_Token]], token: _Token) -> None:
        """Add a token to the last chunk, or to a new one that also gets what follows a comma near the end."""
        chunk = found[-1]
        if len(chunk) == self._length - 2:
            moved: list[_Token] = []
            if token.id != self._comma:
                commas = [index for index, other in enumerate(chunk) if other.id == self._comma]
                if commas and len(chunk) - commas[-1] <= _COMMA_REACH:
                    moved = chunk[commas[-1] + 1 :]
                    del chunk[commas[-1] + 1 :]
            found.append(moved)
        found[-1].append(token)

    def _weighted(self, tokens: list[_Token]) -> Chunk:
        chunk = self._chunk([token.id for token in tokens])
        if all(token.weight == 1.0 for token in tokens):
            return chunk
        weights = np.ones(self._length, np.float32)
        weights[1 : len(tokens) + 1] = [token.weight for token in tokens]
        return Chunk(chunk.ids, weights)

    def _chunk(self, tokens: list[int]) -> Chunk:
        ids = [self._start, *tokens, self._end]
        ids += [self._padding] * (self._length - len(ids))
        return Chunk(np.array([ids], dtype=np.int64))
