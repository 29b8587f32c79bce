"""Tokens of textual inversion embeddings, as diffusers' `maybe_convert_prompt` finds them in a prompt."""

from __future__ import annotations

from collections.abc import Collection
from itertools import count, takewhile

from tokenizers import Tokenizer


class EmbeddingTokens:
    """The tokens that a tokenizer has for embeddings with several vectors.

    In a prompt, the token of such an embedding stands for the tokens of all its vectors: `<cat>` for
    `<cat> <cat>_1 <cat>_2`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts = _texts([token.content for token in tokenizer.get_added_tokens_decoder().values()])

    def expand(self, prompt: str) -> str:
        """Replace each token in `prompt` by the tokens that it stands for."""
        if not self._texts:
            return prompt
        encoding = self._tokenizer.encode(prompt, add_special_tokens=False)
        present = {token for part in (encoding, *encoding.overflowing) for token in part.tokens}
        for token in sorted(self._texts.keys() & present):
            prompt = prompt.replace(token, self._texts[token])
        return prompt


def _texts(added: Collection[str]) -> dict[str, str]:
    """Return the tokens that each token with several vectors stands for."""
    texts = {}
    for token in added:
        if more := list(takewhile(added.__contains__, (f"{token}_{index}" for index in count(1)))):
            texts[token] = " ".join((token, *more))
    return texts
