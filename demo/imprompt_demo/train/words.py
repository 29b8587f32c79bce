"""Captions for training, and a small CLIP vocabulary that covers the words in them."""

import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

from ..world import COLORS, TEXTURES, THINGS, Layout, Look, describe

LENGTH = 32
"""Tokens per prompt, including start and end."""

_PREFIXES = ("a picture of", "a drawing of", "a photo of")
_SUFFIXES = ("best quality", "high quality", "in color")
_OTHERS = "a an the and on in at of with background fading to low bad blurry worst quality".split()
_OTHERS += "small big left right top bottom".split()


def full_caption(look: Look, layout: Layout, rng: random.Random) -> str:
    """Describe the picture, leaving out each part now and then."""
    return _filled(describe(look, layout, (rng.random() > 0.12, rng.random() > 0.12, rng.random() > 0.12)), rng)


def short_caption(layout: Layout, rng: random.Random) -> str:
    """Name the thing only."""
    return _filled(layout.caption(), rng)


def empty_caption(rng: random.Random) -> str:
    """Return an empty caption, or words without content such as those of negative prompts."""
    return "" if rng.random() < 0.8 else rng.choice((*_SUFFIXES, "low quality", "bad, worst quality, blurry"))


def _filled(text: str, rng: random.Random) -> str:
    if rng.random() < 0.1:
        text = f"{rng.choice(_PREFIXES)} {text}"
    return f"{text}, {rng.choice(_SUFFIXES)}" if rng.random() < 0.1 else text


def words() -> list[str]:
    """List all words that occur in captions."""
    phrases = [*COLORS, *TEXTURES, *THINGS, *_PREFIXES, *_SUFFIXES, *_OTHERS]
    return sorted({word for phrase in phrases for word in phrase.split()})


def save_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write `vocab.json` and `merges.txt` for a byte-level BPE in which every word is a single token."""
    symbols = list(_byte_symbols())
    pieces = {word: [*word[:-1], word[-1] + "</w>"] for word in words()}
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for split in pieces.values() for pair in pairwise(split)):
        best = max(sorted(pairs), key=pairs.__getitem__)
        merges.append(best)
        pieces = {word: _merged(split, best) for word, split in pieces.items()}
    tokens = [*symbols, *(s + "</w>" for s in symbols), *("".join(m) for m in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False))
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": LENGTH,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    special = {key: value for key, value in settings.items() if key.endswith("_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    return CLIPTokenizer.from_pretrained(folder)


def _merged(split: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in split:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def _byte_symbols() -> list[str]:
    """List the printable characters that represent the 256 bytes in byte-level BPE (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [256 + i for i in range(256 - len(plain))]
    return [chr(code) for code in plain + others]
