"""Translate the fields of a request into keyword arguments of the SDK."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from imprompt import InvalidRequest
from imprompt_gateway.errors import UnknownModel, refuse
from imprompt_gateway.parameters import (
    ALIASES,
    EMBEDS,
    INSTEAD,
    KNOWN,
    OPENAI,
    PARAMETERS,
    PICTURES,
    STREAM_ONLY,
    hint,
)
from imprompt_gateway.pictures import decode_pictures, white_where_transparent

MAX_SEEDS = 1024
"""Far more than the pictures that a server makes for one request."""
_CLIPS = ("num_frames", "video")
_SIZE = re.compile(r"([0-9]{1,6})x([0-9]{1,6})")
_FILE_TYPES: dict[str, str] = {f"image/{kind}": kind for kind in PARAMETERS["output_format"]["enum"]}


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRequest:
    """A request for pictures or a clip, in the SDK's terms."""

    keywords: Mapping[str, Any]
    """Keyword arguments of `AsyncClient.generate`, or of `AsyncClient.stream` if `stream` is set."""
    output_format: str
    as_file: bool
    """Whether the caller wants the file itself rather than JSON."""
    stream: bool
    partial_images: int | None
    """Number of previews to send; None means one with every report of progress, if there are any."""
    aliases: Mapping[str, str]
    """OpenAI's name for each keyword that the caller gave under it."""

    def in_callers_terms(self, error: InvalidRequest) -> InvalidRequest:
        """Rephrase an error of the SDK or the server for a caller who used OpenAI's names."""
        if error.parameter == "model":
            return UnknownModel(str(error), parameter="model")
        alias = self.aliases.get(error.parameter or "")
        if alias is None:
            return error
        problem = str(error).removeprefix(f"{error.parameter}: ")
        return refuse(alias, problem if len(ALIASES.get(alias, ())) < 2 else f"{error.parameter} {problem}")


def read_request(given: Mapping[str, Any], *, accept: str, required: Sequence[str]) -> ImageRequest:
    """Check the fields of a request, decode its pictures, and translate everything into the SDK's keywords.

    Args:
        accept: the header of that name.

    Raises:
        InvalidRequest: names the first invalid field.
    """
    for name in given:
        if name not in KNOWN:
            raise refuse(name[:100], f"unknown parameter; {hint(name[:100]) or 'see /docs for all parameters'}")
    fields = {name: value for name, value in given.items() if value is not None}
    for name in required:
        if name not in fields and not (name == "prompt" and "prompt_embeds" in fields):
            raise refuse(name, "is required")
    for name in OPENAI.keys() & fields.keys():
        choices = OPENAI[name].get("enum")
        if choices and fields[name] not in choices:
            raise refuse(name, f"must be {' or '.join(choices)}; {INSTEAD.get(name, 'others are not supported')}")
    if not isinstance(fields["model"], str):
        raise refuse("model", "must be a string")
    stream = _flag(fields, "stream")
    if not stream and (alone := sorted(STREAM_ONLY & fields.keys())):
        raise refuse(alone[0], "needs stream: true")
    partial_images = _partial_images(fields)
    keywords = {name: value for name, value in fields.items() if name not in OPENAI} | {"model": fields["model"]}
    aliases = _resolve_aliases(fields, keywords)
    for name in PICTURES & keywords.keys():
        keywords[name] = decode_pictures(name, keywords[name])
    for name in EMBEDS & keywords.keys():
        keywords[name] = _arrays(name, keywords[name])
    if "mask" in fields:
        _only_one("mask", "mask_image", keywords)
        keywords["mask_image"] = white_where_transparent("mask", decode_pictures("mask", fields["mask"]))
        aliases["mask_image"] = "mask"
    keywords["output_format"], as_file = _output_format(keywords, accept)
    count = _count(keywords)
    if as_file and (stream or count > 1):
        raise refuse("stream" if stream else "n", "an answer that is a file holds one picture; accept application/json")
    if "seed" not in keywords and 0 < count <= MAX_SEEDS:
        # Fixed here, so that sending the request upstream again gives the same pictures.
        keywords["seed"] = [secrets.randbelow(2**32) for _ in range(count)]
    if partial_images:
        keywords["preview"] = True
    return ImageRequest(
        keywords=keywords,
        output_format=keywords["output_format"],
        as_file=as_file,
        stream=stream,
        partial_images=partial_images,
        aliases=aliases,
    )


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise refuse(name, "must be true or false")
    return value


def _partial_images(fields: Mapping[str, Any]) -> int | None:
    value = fields.get("partial_images")
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise refuse("partial_images", "must be an integer, 0 or more")
    _only_one("partial_images", "preview", fields)
    return value


def _resolve_aliases(fields: Mapping[str, Any], keywords: dict[str, Any]) -> dict[str, str]:
    """Add the parameters that OpenAI's names stand for to `keywords`; return the name given for each."""
    aliases: dict[str, str] = {}
    for alias in ALIASES.keys() & fields.keys():
        values = _size(fields[alias]) if alias == "size" else (fields[alias],)
        for name, value in zip(ALIASES[alias], values, strict=False):
            _only_one(alias, name, keywords)
            keywords[name], aliases[name] = value, alias
    return aliases


def _size(value: object) -> tuple[int, ...]:
    """Return width and height, or nothing for `auto`."""
    if value == "auto":
        return ()
    size = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if size is None:
        raise refuse("size", "must be WIDTHxHEIGHT in pixels, such as 512x768, or auto")
    return tuple(map(int, size.groups()))


def _only_one(alias: str, name: str, given: Mapping[str, Any]) -> None:
    if name in given:
        raise refuse(alias, f"cannot be combined with {name}")


def _arrays(name: str, value: Any) -> Any:
    """Convert embeddings to an array, or to one per adapter: the SDK would take a list for one entry per adapter."""
    if isinstance(value, Mapping):
        return {key: _arrays(name, item) for key, item in value.items()}
    try:
        with np.errstate(over="ignore"):  # a number that is too large becomes infinity, which servers refuse
            return np.asarray(value, np.float32)
    except (OverflowError, TypeError, ValueError):
        raise refuse(name, "must be nested lists of numbers, or an object of these by adapter") from None


def _output_format(keywords: Mapping[str, Any], accept: str) -> tuple[str, bool]:
    """Return the format of the files, and whether `Accept` asks for the file itself."""
    kind = _first_accepted(accept)
    chosen = keywords.get("output_format")
    if kind is not None and kind != "*":
        if chosen not in (None, kind):
            raise refuse("output_format", f"must be {kind}, which the header Accept asks for")
        chosen = kind
    if chosen is None:
        chosen = "gif" if any(name in keywords for name in _CLIPS) else "png"
    return chosen, kind is not None


def _first_accepted(accept: str) -> str | None:
    """Return the format of the first media type that is served: `*` for any picture, None for JSON."""
    for entry in accept.split(","):
        media_type = entry.partition(";")[0].strip().lower()
        if media_type in ("application/json", "*/*"):
            return None
        if media_type == "image/*" or media_type in _FILE_TYPES:
            return _FILE_TYPES.get(media_type, "*")
    return None


def _count(keywords: Mapping[str, Any]) -> int:
    """Count the pictures or clips that are asked for. A value of a wrong type counts as one; the SDK refuses it."""
    prompt = keywords.get("prompt", keywords.get("prompt_embeds"))
    each = keywords.get("num_images_per_prompt", 1)
    prompts = len(prompt) if isinstance(prompt, list | np.ndarray) and np.ndim(prompt) else 1
    return prompts * (each if isinstance(each, int) and each > 0 else 1)
