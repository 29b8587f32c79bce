"""Parse prompts with weights in the grammar of Stable Diffusion web UI (AUTOMATIC1111).

A copy of what `parse_prompt_attention` accepts (https://github.com/AUTOMATIC1111/stable-diffusion-webui,
`modules/prompt_parser.py`), which takes time proportional to the length of the prompt.
"""

from __future__ import annotations

import re
from itertools import groupby
from typing import NamedTuple

MAX_WEIGHT = 100.0
"""Largest absolute weight; prompts use 0.1 to 2."""
_MAX_OPEN = 64
"""Largest number of brackets open at once: each part of a prompt takes one multiplication per bracket around it."""
_ROUND, _SQUARE = 1.1, 1 / 1.1
_PART = re.compile(r"\\[()\[\]\\]|\\|\(|\[|:\s*([+-]?[.\d]+)\s*\)|\)|\]|[^\\()\[\]:]+|:")
_BREAK = re.compile(r"\bBREAK\b")


class Part(NamedTuple):
    """A part of a prompt with its weight. `is_break` marks a `BREAK`, which ends a chunk."""

    text: str
    weight: float = 1.0
    is_break: bool = False


def parse_weights(prompt: str) -> list[Part]:
    r"""Split a prompt into parts of equal weight.

    `(text)` multiplies the weight of `text` by 1.1, `(text:1.3)` by 1.3, and `[text]` divides it by 1.1; brackets may
    be nested, and those left open extend to the end. A backslash makes the next bracket text.

    Raises:
        ValueError: a weight is not a number or out of range, or too many brackets are open.
    """
    parts: list[tuple[str, bool]] = []
    weights: list[float] = []
    opened: dict[float, list[int]] = {_ROUND: [], _SQUARE: []}

    def add(text: str, *, is_break: bool = False) -> None:
        parts.append((text, is_break))
        weights.append(1.0)

    def close(start: int, factor: float) -> None:
        for index in range(start, len(weights)):
            weights[index] *= factor

    for match in _PART.finditer(prompt):
        text, weight = match[0], match[1]
        if text in ("(", "["):
            opened[_ROUND if text == "(" else _SQUARE].append(len(parts))
            if sum(map(len, opened.values())) > _MAX_OPEN:
                raise ValueError(f"more than {_MAX_OPEN} brackets are open")
        elif weight is not None and opened[_ROUND]:
            close(opened[_ROUND].pop(), _number(weight))
        elif text == ")" and opened[_ROUND]:
            close(opened[_ROUND].pop(), _ROUND)
        elif text == "]" and opened[_SQUARE]:
            close(opened[_SQUARE].pop(), _SQUARE)
        elif text.startswith("\\"):
            add(text[1:])
        else:
            first, *others = _BREAK.split(text)
            add(first.rstrip() if others else first)
            for index, other in enumerate(others, 1):
                add("BREAK", is_break=True)
                add(other.strip() if index < len(others) else other.lstrip())
    for factor, starts in opened.items():
        for start in starts:
            close(start, factor)
    return _merged(parts, weights)


def _merged(parts: list[tuple[str, bool]], weights: list[float]) -> list[Part]:
    """Join neighbors of equal weight, and leave out empty parts."""
    joined: list[Part] = []
    pairs = zip(parts, weights, strict=True)
    for (weight, is_break), group in groupby(pairs, key=lambda pair: (pair[1], pair[0][1])):
        if is_break:
            joined += [Part("BREAK", is_break=True) for _ in group]
        elif text := "".join(text for (text, _), _ in group):
            if not abs(weight) <= MAX_WEIGHT:
                raise ValueError(f"a weight of {weight:g} is beyond {MAX_WEIGHT:g}")
            joined.append(Part(text, weight))
    return joined


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"the weight {text[:40]!r} is not a number") from None
