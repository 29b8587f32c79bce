"""Tokenize prompts without transformers: the export writes a `tokenizers` file for each text encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from imprompt_serving.pipeline.embedding_tokens import EmbeddingTokens
from imprompt_serving.specs import TextEncoder


class PromptTokenizer:
    """Tokenizes a prompt, truncated and padded to the encoder's length (`CLIPTokenizer(padding="max_length")`)."""

    def __init__(self, folder: Path, encoder: TextEncoder) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / f"{encoder.engine}.tokenizer.json"))
        self._embeddings = EmbeddingTokens(self._tokenizer)
        pad = self._tokenizer.id_to_token(encoder.pad_token_id)
        self._tokenizer.enable_truncation(encoder.max_length)
        self._tokenizer.enable_padding(length=encoder.max_length, pad_id=encoder.pad_token_id, pad_token=pad)

    def __call__(self, prompt: str) -> np.ndarray:
        """Return token ids [1, length]."""
        return self.with_rest(prompt)[0]

    def with_rest(self, prompt: str) -> tuple[np.ndarray, str]:
        """Return token ids [1, length], and the part of the prompt that did not fit."""
        prompt = self._embeddings.expand(prompt)
        encoding = self._tokenizer.encode(prompt)
        rest = ""
        if encoding.overflowing:
            first = encoding.overflowing[0]
            words = zip(first.offsets, first.special_tokens_mask, strict=True)
            rest = prompt[next((start for (start, _), special in words if not special), len(prompt)) :]
        return np.array([encoding.ids], dtype=np.int64), rest
