"""Encode prompts into the text embeddings of the family (diffusers' `encode_prompt`).

A prompt that is longer than the input of the text encoder can be split into chunks, which are encoded one by one and
joined along the tokens, as compel and diffusers' community pipelines do. All prompts of a request get the same number
of chunks: shorter ones are followed by empty chunks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from imprompt_serving.errors import InvalidRequest
from imprompt_serving.families import get_family
from imprompt_serving.pipeline.models import Models, Tensors
from imprompt_serving.pipeline.prompts import Prompts, TextPrompts
from imprompt_serving.pipeline.request import Request
from imprompt_serving.pipeline.stages import Stages
from imprompt_serving.pipeline.text import Chunk, PromptTokenizer
from imprompt_serving.specs import Bundle
from imprompt_serving.tensor_names import NEGATIVE

_CONCURRENT_CALLS = 16
"""Chunks of one request that each text encoder encodes at the same time."""
_MAX_QUOTE = 200
"""Largest number of characters that a warning quotes."""

Branch = list[list[list[Chunk]]]
"""For each text encoder, the chunks of each prompt."""


class TextPromptEncoder:
    """Encodes the prompts of a request, except those that the caller has encoded."""

    def __init__(self, bundle: Bundle, folder: Path, models: Models) -> None:
        self._bundle, self._models, self._family = bundle, models, get_family(bundle.family)
        self._tokenizers = [PromptTokenizer(folder, encoder) for encoder in bundle.text_encoders]

    async def encode(self, request: Request, stages: Stages, warnings: set[str]) -> Tensors:
        """Return the embeddings of each branch, and add a warning for each prompt that is truncated."""
        text = request.text
        with stages.measure("text_encoder"):
            guided = request.encode_prompt or self._bundle.guided(request)
            branches = await asyncio.to_thread(self._tokenize, text, guided, warnings)
            counts = [len(chunks) for branch in branches.values() for prompts in branch for chunks in prompts]
            length = self._bundle.text_encoders[0].max_length
            counts += [embeds.shape[1] // length for embeds in text.embeds.values() if embeds.ndim == 3]
            # As in diffusers, clip_skip does not apply to negative prompts.
            skips = {"": request.settings.clip_skip, NEGATIVE: 0}
            encoded = await asyncio.gather(
                *(self._embeds(branch, max(counts), prefix, skips[prefix]) for prefix, branch in branches.items())
            )
        tensors = {name: value for name, value in text.embeds.items() if guided or not name.startswith(NEGATIVE)}
        tensors |= {name: value for part in encoded for name, value in part.items()}
        if guided and text.zero_negatives:
            tensors |= {NEGATIVE + name: np.zeros_like(value) for name, value in tensors.items()}
        return tensors

    def _tokenize(self, text: TextPrompts, guided: bool, warnings: set[str]) -> dict[str, Branch]:
        """Split the prompts of the branches that need encoding into chunks, by the prefix of the branch."""
        branches = {}
        if text.prompts is not None:
            branches[""] = self._branch(text, text.prompts, "", warnings)
        if guided and not text.zero_negatives and NEGATIVE + "prompt_embeds" not in text.embeds:
            empty = (("",) * text.count,) * len(self._tokenizers)
            branches[NEGATIVE] = self._branch(text, text.negative_prompts or empty, NEGATIVE, warnings)
        return branches

    def _branch(self, text: TextPrompts, prompts: Prompts, prefix: str, warnings: set[str]) -> Branch:
        branch: Branch = []
        first = self._family.prompts[0]
        for name, tokenizer, texts in zip(self._family.prompts, self._tokenizers, prompts, strict=True):
            split = tokenizer.weighted_chunks if text.weighted else tokenizer.chunks
            branch.append([])
            for prompt in texts:
                chunks, rest = split(prompt, text.most_chunks)
                branch[-1].append(chunks)
                if rest:
                    parameter = prefix + (name if texts != prompts[0] else first)
                    tokens = sum(chunk.ids.size for chunk in chunks)
                    warnings.add(f"{parameter}: truncated to {tokens} tokens; cut off: {_quoted(rest)}")
        return branch

    async def _embeds(self, branch: Branch, count: int, prefix: str, clip_skip: int) -> Tensors:
        """Encode the prompts of one branch, each as `count` chunks."""
        outputs = await asyncio.gather(
            *(self._run(index, prompts, count, prefix, clip_skip) for index, prompts in enumerate(branch))
        )
        return {prefix + name: embeds for name, embeds in self._family.join_text(outputs).items()}

    async def _run(
        self, index: int, prompts: Sequence[Sequence[Chunk]], count: int, prefix: str, clip_skip: int
    ) -> Tensors:
        """Run text encoder `index` on each prompt. Repeated chunks are answered by Triton's response cache."""
        (empty,), _ = self._tokenizers[index].chunks("", 1)
        model = self._bundle.model(self._bundle.text_encoders[index].engine)
        skipped = np.array([[clip_skip]], np.int64)
        semaphore = asyncio.Semaphore(_CONCURRENT_CALLS)

        async def call(ids: np.ndarray) -> Tensors:
            async with semaphore:
                return await self._models.call(model, {"input_ids": ids, "clip_skip": skipped})

        all_padded = [[*chunks, *[empty] * (count - len(chunks))] for chunks in prompts]
        distinct = {chunk.ids.tobytes(): chunk.ids for padded in all_padded for chunk in padded}
        by_ids = dict(zip(distinct, await asyncio.gather(*map(call, distinct.values())), strict=True))
        parameter = prefix + self._family.prompts[index]
        rows = []
        for padded in all_padded:
            states = [_weighted(by_ids[c.ids.tobytes()]["hidden_states"], c.weights, parameter) for c in padded]
            # As in diffusers' community pipelines, the pooled embedding is that of the first chunk.
            rows.append(by_ids[padded[0].ids.tobytes()] | {"hidden_states": np.concatenate(states, axis=1)})
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def _weighted(states: np.ndarray, weights: np.ndarray | None, parameter: str) -> np.ndarray:
    """Multiply hidden states [1, tokens, features] by the weights of the tokens, and restore their mean.

    That is the web UI's default (`EmphasisOriginal`), which treats each chunk and each text encoder on its own.

    Raises:
        InvalidRequest: the weights make a mean of zero.
    """
    if weights is None:
        return states
    weighted = states * weights[:, None]
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        weighted = weighted * (states.mean() / weighted.mean())
    if not np.isfinite(weighted).all():
        raise InvalidRequest(parameter, "the weights cancel each other out")
    return weighted


def _quoted(text: str) -> str:
    """Return the start of `text` on one line, for a warning."""
    line = " ".join(text[: 2 * _MAX_QUOTE].split())
    return line if len(line) <= _MAX_QUOTE else f"{line[:_MAX_QUOTE]}..."
