"""Parse the text of a request: prompts, or the embeddings that a caller sends in their place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from imprompt_serving.errors import InvalidRequest
from imprompt_serving.families import Family, get_family
from imprompt_serving.parameters import MAX_SCALE
from imprompt_serving.pipeline.prompt_syntax import parse_weights
from imprompt_serving.pipeline.reader import Reader
from imprompt_serving.specs import Bundle, Limits
from imprompt_serving.tensor_names import NEGATIVE

Prompts = tuple[tuple[str, ...], ...]
"""For each text encoder, a prompt for every `num_images_per_prompt` results."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextPrompts:
    """The texts of a request. In each branch, embeddings may take the place of prompts."""

    count: int
    """Number of prompts."""
    prompts: Prompts | None
    """None if the request has embeddings."""
    negative_prompts: Prompts | None
    """None if the request has negative embeddings, or nothing to avoid."""
    embeds: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Given embeddings by parameter, such as `prompt_embeds` and `negative_prompt_embeds`."""
    zero_negatives: bool = False
    """Whether the embeddings of the unconditional branch are zeros."""
    weighted: bool = False
    """Whether prompts are in the web UI's grammar."""
    most_chunks: int = 1
    """Largest number of chunks of a prompt; the rest is cut off."""

    @property
    def tokens(self) -> int | None:
        """The number of tokens of the given embeddings; None if all texts need encoding."""
        return next((value.shape[1] for value in self.embeds.values() if value.ndim == 3), None)


def parse_prompts(read: Reader, bundle: Bundle) -> TextPrompts:
    """Parse prompts and embeddings, in the combinations that diffusers' pipelines take (`check_inputs`).

    Raises:
        InvalidRequest: there is no prompt, or both a prompt and its embeddings, or a shape does not fit.
    """
    family = get_family(bundle.family)
    _check_characters(read, bundle.limits, family)
    embeds = _embeds(read, bundle, "") | _embeds(read, bundle, NEGATIVE)
    prompts = None if "prompt_embeds" in embeds else _prompts(read, family)
    count = len(embeds["prompt_embeds"]) if prompts is None else len(prompts[0])
    for name, value in embeds.items():
        if not count or len(value) != count:
            raise InvalidRequest(name, f"has embeddings for {len(value)} prompts, expected {count or 'at least 1'}")
    weighted = read.choice("prompt_syntax") == "a1111"
    negatives = None if NEGATIVE + "prompt_embeds" in embeds else _negative_prompts(read, family, count)
    return TextPrompts(
        count=count,
        prompts=prompts,
        negative_prompts=negatives,
        embeds=embeds,
        zero_negatives=bundle.force_zeros_for_empty_prompt
        and negatives is None
        and NEGATIVE + "prompt_embeds" not in embeds,
        weighted=weighted,
        most_chunks=_most_chunks(read, bundle, weighted=weighted),
    )


def _check_characters(read: Reader, limits: Limits, family: Family) -> None:
    """Refuse long prompts before they are tokenized."""
    count = 0
    for name in (prefix + prompt for prompt in family.prompts for prefix in ("", NEGATIVE)):
        count += sum(map(len, read.texts(name)))
        if count > limits.prompt_characters:
            raise InvalidRequest(name, f"the prompts of a request have at most {limits.prompt_characters} characters")


def _most_chunks(read: Reader, bundle: Bundle, *, weighted: bool) -> int:
    """Return how many chunks a prompt may have, and check the syntax of weighted prompts."""
    limit = bundle.shapes.prompt_chunks
    if weighted:
        for name in (prefix + prompt for prompt in get_family(bundle.family).prompts for prefix in ("", NEGATIVE)):
            for text in read.texts(name):
                try:
                    parse_weights(text)
                except ValueError as error:
                    raise InvalidRequest(name, str(error)) from None
    return min(read.integer("max_embeddings_multiples", default=limit if weighted else 1), limit)


def _prompts(read: Reader, family: Family) -> Prompts:
    first, *others = family.prompts
    prompt = read.texts(first)
    if not prompt:
        raise InvalidRequest(first, "at least one prompt is needed")
    texts_by_name = {name: read.texts(name) for name in others}
    for name, texts in texts_by_name.items():
        if len(texts) not in (0, len(prompt)):
            raise InvalidRequest(name, f"got {len(texts)} for {len(prompt)} prompts")
    return (prompt, *(texts or prompt for texts in texts_by_name.values()))


def _negative_prompts(read: Reader, family: Family, count: int) -> Prompts | None:
    first, *others = (NEGATIVE + name for name in family.prompts)
    if first not in read:
        for name in others:
            if name in read:
                raise InvalidRequest(name, f"needs a {first}")
        return None
    prompt = read.one_or_each(first, count, "prompts", default="")
    return (prompt, *(read.one_or_each(name, count, "prompts") if read.texts(name) else prompt for name in others))


def _embeds(read: Reader, bundle: Bundle, prefix: str) -> dict[str, np.ndarray]:
    """Read the embeddings of one branch: all that its family needs, or none."""
    family = get_family(bundle.family)
    shapes = {prefix + name: shape for name, shape in family.text_shapes(bundle).items()}
    given = {name: read.floats(name) for name in shapes if name in read}
    if not given:
        return {}
    for name in shapes:
        if name not in given:
            raise InvalidRequest(name, f"is needed next to {', '.join(given)}")
    for name in (prefix + prompt for prompt in family.prompts):
        if name in read:
            raise InvalidRequest(name, f"cannot be combined with {prefix}prompt_embeds")
    for name, shape in shapes.items():
        value, most = given[name], bundle.max_text_tokens
        if value.ndim != 1 + len(shape) or value.shape[-1] != shape[-1]:
            axes = ", ".join([*("prompts", "tokens")[: len(shape)], str(shape[-1])])
            raise InvalidRequest(name, f"must have shape [{axes}], got {list(value.shape)}")
        if value.ndim == 3 and not 1 <= value.shape[1] <= most:
            raise InvalidRequest(name, f"must have 1 to {most} tokens, got {value.shape[1]}")
        if not (np.abs(value) <= MAX_SCALE).all():  # NaN too
            raise InvalidRequest(name, f"must be finite, from {-MAX_SCALE:g} to {MAX_SCALE:g}")
    return given


def check_lengths(text: TextPrompts, bundle: Bundle) -> None:
    """Check that the embeddings of both branches of a guided request can have the same shape.

    A prompt becomes whole chunks, so the embeddings of the other branch must be whole chunks too.
    """
    names = ("prompt_embeds", NEGATIVE + "prompt_embeds")
    positive, negative = (text.embeds.get(name) for name in names)
    chunk = bundle.text_encoders[0].max_length
    if positive is not None and negative is not None:
        if positive.shape != negative.shape:
            problem = f"must have the shape of prompt_embeds, {list(positive.shape)}; got {list(negative.shape)}"
            raise InvalidRequest(names[1], problem)
    elif negative is not None and negative.shape[1] % chunk:
        problem = f"next to a prompt, the number of tokens must be a multiple of {chunk}; got {negative.shape[1]}"
        raise InvalidRequest(names[1], problem)
    elif positive is not None and positive.shape[1] % chunk and not text.zero_negatives:
        problem = f"is needed next to prompt_embeds of {positive.shape[1]} tokens, which is not a multiple of {chunk}"
        raise InvalidRequest(names[1], problem)
