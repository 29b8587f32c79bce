"""Textual inversion embeddings: learned vectors that words in a prompt stand for (https://arxiv.org/abs/2208.01618).

Files have the layout of diffusers (one tensor, named after its token), of AUTOMATIC1111 (`string_to_param`, or
`emb_params`), or for SDXL one tensor per text encoder (`clip_l`, `clip_g`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imprompt_export import checkpoint_kinds
from imprompt_export.bundle import BundleFile
from imprompt_export.errors import BundleError, refusing
from imprompt_export.families import ExportFamily
from imprompt_export.sections import TextualInversionSection
from imprompt_export.sources import flat, tensors

_ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
_UNNAMED = "emb_params"


def check(bundle: BundleFile, widths: Mapping[str, int]) -> None:
    """Check that the embeddings of `bundle` have tokens and fit the text encoders, without torch.

    Args:
        bundle: the bundle.
        widths: the width of token embeddings, by text encoder of the base.

    Raises:
        BundleError: an embedding has no token or that of another one, or is made for another family.
    """
    known: set[str] = set()
    for section in bundle.textual_inversion:
        what = _what(section)
        content = tensors(what, bundle.embedding_file(section))
        if content is None:
            continue
        tokens, _ = _tokens_and_vectors(what, content, section, widths)
        for token in [tokens] if isinstance(tokens, str) else tokens:
            if token in known:
                raise BundleError(f"{what}: token: {token} would stand for two embeddings, it is used twice")
            known.add(token)


def load(bundle: BundleFile, pipeline: Any, family: ExportFamily) -> None:
    """Load the embeddings of `bundle` into the text encoders and tokenizers of a diffusers `pipeline`.

    Raises:
        BundleError: an embedding does not fit, or its token is a word of the vocabulary.
    """
    parts = {
        encoder: (getattr(pipeline, encoder), getattr(pipeline, tokenizer))
        for encoder, tokenizer in family.text_encoders
    }
    widths = {encoder: model.config.hidden_size for encoder, (model, _) in parts.items()}
    for section in bundle.textual_inversion:
        what = _what(section)
        tokens, vectors = _tokens_and_vectors(what, _read(bundle.embedding_file(section)), section, widths)
        for encoder, embedding in vectors.items():
            model, tokenizer = parts[encoder]
            with refusing(what):
                pipeline.load_textual_inversion(embedding, token=tokens, text_encoder=model, tokenizer=tokenizer)


def _what(section: TextualInversionSection) -> str:
    return f"textual_inversion {section.path}"


def _read(file: Path) -> Mapping[str, Any]:
    """Read a file of tensors, nested as they are, without running any code in it."""
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    import torch

    content: Mapping[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return content


def _tokens_and_vectors(
    what: str, content: Mapping[str, Any], section: TextualInversionSection, widths: Mapping[str, int]
) -> tuple[str | list[str], dict[str, Any]]:
    """Return the token of an embedding, or one token per vector, and its tensor for each text encoder."""
    named, vectors = _split(what, content)
    for encoder, embedding in vectors.items():
        if encoder not in widths:
            raise BundleError(f"{what}: it has an embedding for {encoder}, which the base lacks; it is made for SDXL")
        if len(embedding.shape) not in (1, 2) or embedding.shape[-1] != widths[encoder]:
            raise BundleError(
                f"{what}: its embedding has the shape {list(embedding.shape)}, but the {encoder} of the base takes "
                f"vectors of width {widths[encoder]}; it is made for another family"
            )
    token = named if section.token is None else section.token
    if token is None:
        raise BundleError(f"{what}: the file names no token; set token to the word that prompts will use")
    if not all(token) or not token:
        raise BundleError(f"{what}: token: must not be empty")
    if isinstance(token, str):
        return token, vectors
    for embedding in vectors.values():
        count = embedding.shape[0] if len(embedding.shape) == 2 else 1
        if count != len(token):
            raise BundleError(f"{what}: token has {len(token)} words for {count} vectors; name one, or one per vector")
    return list(token) if len(token) > 1 else token[0], vectors


def _split(what: str, content: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Return the token that a file names, if any, and its tensor for each text encoder."""
    found = flat(content)
    if found and found.keys() <= _ENCODERS.keys():
        return None, {_ENCODERS[name]: embedding for name, embedding in found.items()}
    if len(found) != 1:
        raise BundleError(f"{what} is {checkpoint_kinds.kind_of_tensors(found)}, not a textual inversion embedding")
    ((name, embedding),) = found.items()
    if "string_to_param" in content:
        return content.get("name"), {"text_encoder": embedding}
    return None if name == _UNNAMED else name, {"text_encoder": embedding}
