"""Prompts of several chunks, and weighted prompts: the same pictures as diffusers with embeddings of compel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from compel import Compel, ReturnedEmbeddingsType, SplitLongTextMode
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from imprompt import InvalidRequest
from parity import assert_different, assert_same
from served import Served
from tiny import oracle

SMALL: dict[str, Any] = {"num_inference_steps": 4, "height": 64, "width": 64}
LONG = " ".join(f"a {word} cat, {word} dog and snow" for word in ("big", "small", "red", "blue", "dark")) * 4
"""A prompt of several chunks."""


@pytest.fixture(scope="module")
def pipe(served: Any) -> Any:
    return oracle.pipeline(served("sd15").bundle.checkpoints / "base", (), StableDiffusionPipeline)


@pytest.fixture(scope="module")
def sdxl(served: Any) -> Served:
    return served("sdxl")


@pytest.fixture(scope="module")
def sdxl_pipe(sdxl: Served) -> Any:
    return oracle.pipeline(sdxl.bundle.checkpoints / "base", (), StableDiffusionXLPipeline)


def compel_embeds(pipe: Any, prompt: str, negative_prompt: str) -> dict[str, torch.Tensor]:
    """Encode long prompts with compel, and pad the shorter one."""
    both = hasattr(pipe, "tokenizer_2")
    compel = Compel(
        tokenizer=[pipe.tokenizer, pipe.tokenizer_2] if both else pipe.tokenizer,
        text_encoder=[pipe.text_encoder, pipe.text_encoder_2] if both else pipe.text_encoder,
        truncate_long_prompts=False,
        split_long_text_mode=SplitLongTextMode.BRUTAL,
        requires_pooled=[False, True] if both else False,
        **(
            {"returned_embeddings_type": ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED}
            if both
            else {}
        ),
    )
    with torch.no_grad():
        found = [compel(text) for text in (prompt, negative_prompt)]
        states = [one[0] if both else one for one in found]
        positive, negative = compel.pad_conditioning_tensors_to_same_length(
            states, precomputed_padding=compel("")[0] if both else compel("")
        )
    pooled = {"pooled_prompt_embeds": found[0][1], "negative_pooled_prompt_embeds": found[1][1]} if both else {}
    return {"prompt_embeds": positive, "negative_prompt_embeds": negative, **pooled}


@pytest.mark.parametrize(("prompt", "negative_prompt"), [(LONG, "dark"), ("a cat", LONG), (LONG, LONG[:500])])
def test_long_prompts(sd15: Served, pipe: Any, prompt: str, negative_prompt: str) -> None:
    texts = {"prompt": prompt, "negative_prompt": negative_prompt}
    result = sd15.generate(**SMALL, **texts, max_embeddings_multiples=8, seed=0)
    assert not result.warnings
    expected = oracle.generate(pipe, **SMALL, prompt=None, **compel_embeds(pipe, prompt, negative_prompt))
    assert_same(result, expected)
    assert_different(result, sd15.generate(**SMALL, **texts, seed=0))


def test_long_prompts_of_sdxl(sdxl: Served, sdxl_pipe: Any) -> None:
    texts = {"prompt": LONG, "negative_prompt": "dark"}
    result = sdxl.generate(**SMALL, **texts, max_embeddings_multiples=8, seed=0)
    expected = oracle.generate(sdxl_pipe, **SMALL, prompt=None, **compel_embeds(sdxl_pipe, LONG, "dark"))
    assert_same(result, expected)
    assert_different(result, sdxl.generate(**SMALL, **texts, max_embeddings_multiples=2, seed=0))


def test_second_prompt_with_more_chunks(sdxl: Served, sdxl_pipe: Any) -> None:
    """The encoder with the shorter prompt gets empty chunks."""
    embeds = sdxl.client.encode_prompt("sdxl", "a cat", prompt_2="a " * 100, max_embeddings_multiples=2)
    short = sdxl.client.encode_prompt("sdxl", "a cat")
    empty = sdxl.client.encode_prompt("sdxl", "")
    width = sdxl_pipe.text_encoder.config.hidden_size
    assert embeds["prompt_embeds"].shape[1] == 154
    np.testing.assert_allclose(embeds["prompt_embeds"][:, :77, :width], short["prompt_embeds"][..., :width], atol=1e-5)
    np.testing.assert_allclose(embeds["prompt_embeds"][:, 77:, :width], empty["prompt_embeds"][..., :width], atol=1e-5)


def test_a_prompt_beyond_the_limit_is_cut_with_a_warning(sd15: Served) -> None:
    result = sd15.generate(**SMALL, prompt="a " * 150 + "the end", max_embeddings_multiples=2, seed=0)
    assert result.warnings == ["prompt: truncated to 154 tokens; cut off: the end"]
    beyond = sd15.generate(**SMALL, prompt="a " * 600 + "the end", max_embeddings_multiples=20, seed=0)
    assert beyond.warnings == ["prompt: truncated to 616 tokens; cut off: the end"]


def weighted_states(encode: Any, ids: torch.Tensor, weights: list[float]) -> torch.Tensor:
    """Multiply by weights and restore the mean, as the web UI does by default (`EmphasisOriginal`)."""
    states: torch.Tensor = encode(ids)
    weighted = states * torch.tensor(weights)[:, None]
    return weighted * (states.mean() / weighted.mean())


def tokens(tokenizer: Any, *parts: tuple[str, float]) -> tuple[torch.Tensor, list[float]]:
    """Join the tokens of `parts` into the input of a text encoder, with the weight of each token."""
    ids, weights = [tokenizer.bos_token_id], [1.0]
    for text, weight in parts:
        added = tokenizer(text, add_special_tokens=False).input_ids
        ids, weights = ids + added, weights + [weight] * len(added)
    missing = 76 - len(ids)
    ids += [tokenizer.eos_token_id] + [tokenizer.pad_token_id] * missing
    return torch.tensor([ids]), weights + [1.0] * (missing + 1)


PARTS = ((("a ", 1.0), ("red", 1.4), (" cat", 1.0)), (("a ", 1.0), ("dog", 1 / 1.1), (" in the ", 1.0), ("snow", 1.1)))
WEIGHTED = "a (red:1.4) cat BREAK a [dog] in the (snow)"


def test_weighted_prompts(sd15: Served, pipe: Any) -> None:
    with torch.no_grad():
        chunks = [tokens(pipe.tokenizer, *parts) for parts in PARTS]
        positive = torch.cat([weighted_states(lambda ids: pipe.text_encoder(ids)[0], *c) for c in chunks], dim=1)
        (dark, _), (empty, _) = tokens(pipe.tokenizer, ("dark", 1.0)), tokens(pipe.tokenizer)
        negative = torch.cat([pipe.text_encoder(ids)[0] for ids in (dark, empty)], dim=1)
    expected = oracle.generate(pipe, **SMALL, prompt=None, prompt_embeds=positive, negative_prompt_embeds=negative)
    texts = {"prompt": WEIGHTED, "negative_prompt": "dark"}
    result = sd15.generate(**SMALL, **texts, prompt_syntax="a1111", seed=0)
    assert_same(result, expected)
    assert_different(result, sd15.generate(**SMALL, **texts, seed=0))
    other = {**texts, "prompt": WEIGHTED.replace("1.4", "1.2")}
    assert_different(result, sd15.generate(**SMALL, **other, prompt_syntax="a1111", seed=0))


def test_weighted_prompts_of_sdxl(sdxl: Served, sdxl_pipe: Any) -> None:
    """Each text encoder has its own mean; the pooled embedding is that of the first chunk, without weights."""
    encoders = ((sdxl_pipe.tokenizer, sdxl_pipe.text_encoder), (sdxl_pipe.tokenizer_2, sdxl_pipe.text_encoder_2))
    with torch.no_grad():
        positive = torch.cat(
            [
                torch.cat(
                    [
                        weighted_states(
                            lambda ids, model=model: model(ids, output_hidden_states=True).hidden_states[-2],
                            *tokens(tokenizer, *parts),
                        )
                        for parts in PARTS
                    ],
                    dim=1,
                )
                for tokenizer, model in encoders
            ],
            dim=-1,
        )
        pooled = sdxl_pipe.text_encoder_2(tokens(sdxl_pipe.tokenizer_2, *PARTS[0])[0]).text_embeds
    expected = oracle.generate(sdxl_pipe, **SMALL, prompt=None, prompt_embeds=positive, pooled_prompt_embeds=pooled)
    assert_same(sdxl.generate(**SMALL, prompt=WEIGHTED, prompt_syntax="a1111", seed=0), expected)


def test_invalid_weights_are_refused_by_name(sd15: Served) -> None:
    with pytest.raises(InvalidRequest, match=r"^negative_prompt: the weight '1\.2\.3' is not a number"):
        sd15.generate(**SMALL, prompt="a", negative_prompt="(dark:1.2.3)", prompt_syntax="a1111")
