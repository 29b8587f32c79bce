"""Values that callers send by mistake or with bad intent: numbers at the limits of their types, text, and JSON."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import numpy as np

from fuzz.tensors import NUMPY

COUNTS = (1, 1, 1, 1, 2, 3, 0, 9, 65)
"""Lengths of lists, mostly one."""
SMALL_INTEGERS = (-8, -1, 0, 1, 1, 2, 2, 3, 4, 5, 7, 8, 9, 10, 16, 17, 32, 63, 64, 64, 65, 72, 100, 128, 136)
FLOATS = (0.0, -0.0, 0.25, 0.5, 0.5, 1.0, 1.0, 1.5, 2.0, -1.0, -3.5, 1e-3, 1e6, 1e30, -1e30, 1e308, -1e308, 5e-324)
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))

TEXTS: tuple[bytes, ...] = (
    b"",
    b"x",
    b"\0",
    b"a\0b",
    b" ",
    b"\r\n\t",
    b"None",
    b"null",
    b"%s%n{}{0}",
    b"../../etc/passwd",
    b"a photo of a cat, " * 40,
    b"(((((((((cat:1e999)))))))))",
    b"[cat:dog:0.5] AND {x|y} <lora:a:1> \\(",
    b"\xff\xfe",  # not UTF-8
    b"\xed\xa0\x80",  # a lone surrogate
    b"\xf4\x90\x80\x80",  # beyond Unicode
    "\u4e2d\u6587 \u202e\u200d\ufeff e\u0301 \U0001f468\u200d\U0001f469".encode(),
    "\u0130\ufdfa".encode() * 200,  # these grow when lowercased or normalized
    b"a" * 5_000,
    b"x" * 20_000,
)
HUGE_TEXTS: tuple[bytes, ...] = (
    b"a " * 100_000,
    b"a" * 1_000_000,
    "\u4e2d".encode() * 400_000,
    b"a photo " * 1_250_000,
)

JSON_SCALARS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 4, 10, 1000, 10**6, 3 * 10**7, 10**30, -(10**30)),
    *FLOATS,
    *NOT_FINITE,
    *("", "x", "linear", "\0", "\ud83d", "\u4e2d", "x" * 2_000),
)
JSON_TEXTS: tuple[str, ...] = (
    *("", "{", "[]", "{}", "null", "1", '"abc"', "NaN", "-", '{"a":1}', '{"a":1,"a":2}', "\ufeff{}", '"\\ud83d"'),
    "[" * 900 + "]" * 900,
    '{"down":' * 900 + "1" + "}" * 900,
    "[" * 30_000,
    "9" * 5_000,
    f'{{"beta_start": {"9" * 5_000}}}',
    '{"beta_start":1e999}',
    '{"__class__":"os.system","__proto__":{}}',
    f'{{"x":"{"y" * 70_000}"}}',
)
"""Complete documents."""
_KEYS = ("down", "up", "mid", "block_0", "block_1", "block_2", "0", "", "x")


def integers(rng: Random, dtype: str) -> list[int]:
    """Draw integers that fit into `dtype`, including its limits."""
    edges: Any = np.iinfo(NUMPY[dtype])
    known = [value for value in SMALL_INTEGERS if edges.min <= value <= edges.max]
    known += [int(edges.min), int(edges.max), int(edges.max) - 5]
    return [rng.choice(known) for _ in range(rng.choice(COUNTS))]


def floats(rng: Random) -> list[float]:
    return [rng.choice(FLOATS if rng.random() < 0.8 else NOT_FINITE) for _ in range(rng.choice(COUNTS))]


def texts(rng: Random, known: tuple[str, ...]) -> list[bytes]:
    """Draw texts: half are words that mean something to the server, and some are very long."""
    if rng.random() < 0.05:
        return [rng.choice(HUGE_TEXTS)]
    words = [word.encode() for word in known] or [b"x"]
    return [rng.choice(words) if rng.random() < 0.5 else rng.choice(TEXTS) for _ in range(rng.choice(COUNTS))]


def json_value(rng: Random, depth: int = 0) -> Any:
    """Draw any JSON value, nested a few levels."""
    match rng.randrange(10) if depth < 4 else 0:
        case 8:
            return [json_value(rng, depth + 1) for _ in range(rng.randrange(4))]
        case 9:
            return {rng.choice(_KEYS): json_value(rng, depth + 1) for _ in range(rng.randrange(3))}
        case _:
            return rng.choice(JSON_SCALARS)


def json_text(rng: Random) -> bytes:
    """Draw a JSON document, or something that looks like one."""
    if rng.random() < 0.4:
        text = rng.choice(JSON_TEXTS)
    elif rng.random() < 0.5:
        text = json.dumps(json_value(rng))
    else:
        text = json.dumps({rng.choice(_KEYS[:3]): {rng.choice(_KEYS[3:]): json_value(rng)}}, ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass")


def numbers(rng: Random, dtype: str, dims: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Draw an array of `dtype` with roughly the declared shape, filled with a single value."""
    shape = [rng.choice((1, 1, 2, 2, 3, 0)) if size < 0 else size for size in dims]
    if shape and rng.random() < 0.2:
        shape[rng.randrange(len(shape))] = rng.choice((0, 1, 2, 3, 5, 17, 64))
    shape = [min(size, 4096) for size in shape]
    kind = NUMPY[dtype]
    if issubclass(kind, np.floating):
        fill = rng.choice((0.0, 1.0, 0.5, 1e-40, 1e38, -1e30, *NOT_FINITE))
        return np.full(shape, fill).astype(kind)
    if kind is np.bool_:
        return np.full(shape, rng.random() < 0.5)
    edges: Any = np.iinfo(np.dtype(kind))
    return np.full(shape, rng.choice((0, 1, 2, 500, int(edges.max), int(edges.min))), kind)
