"""A small byte-level BPE vocabulary with the files and the token order of CLIP's.

Ids: 256 bytes, 256 bytes at the end of a word, merges, `<|startoftext|>`, `<|endoftext|>`. So `!` is 0, with which
SDXL's second tokenizer pads, and the end token has the highest id, which CLIP's pooled output looks for.
"""

import json
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 256
CORPUS = """a photo of a cat wearing a red hat, best quality, high quality, masterpiece
a polar bear sitting in a chair drinking a milkshake, sharp focus, 8k
the girl in the garden with flowers, by the lake and the mountain at sunset, oil painting, in the style of monet
monochrome, lowres, bad anatomy, worst quality, low quality, deformed, ugly, wrong proportion, bad hands, blurry
an astronaut riding a horse on mars, cinematic light, highly detailed, photorealistic, portrait of a woman, smiling
a dog running on the beach, blue sky, green grass, yellow car, black and white, wooden house, city street at night
wonderwoman, sunglasses, statue of a man, an old king, a young queen, dancing in the rain, watercolor, anime, render"""


def _byte_characters() -> list[str]:
    """List GPT-2's printable characters for the 256 bytes, in CLIP's order: printable bytes first, then the others."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for symbol in word:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return tuple(merged)


@cache
def _learn_merges() -> tuple[tuple[str, str], ...]:
    """Learn byte-pair merges: repeatedly merge the most frequent pair, breaking ties alphabetically."""
    words = Counter((*word[:-1], word[-1] + "</w>") for word in CORPUS.replace(",", " ,").split())
    merges: list[tuple[str, str]] = []
    while len(merges) < MERGES:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = Counter({_merge(word, best): count for word, count in words.items()})
    return tuple(merges)


VOCABULARY_SIZE = 512 + MERGES + 2


def write_tokenizer(folder: Path, *, pad_token: str = END) -> CLIPTokenizer:
    """Write `vocab.json`, `merges.txt` and the two configuration files of the public repositories."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").unlink(missing_ok=True)  # transformers writes it, but the public folders do not have it
    characters, merges = _byte_characters(), _learn_merges()
    tokens = [*characters, *(c + "</w>" for c in characters), *("".join(pair) for pair in merges), START, END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    assert len(vocabulary) == VOCABULARY_SIZE
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""]))

    def special(content: str) -> dict[str, str | bool]:
        return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}

    special_tokens = {"bos_token": special(START), "eos_token": special(END), "unk_token": special(END)}
    (folder / "special_tokens_map.json").write_text(json.dumps({**special_tokens, "pad_token": pad_token}, indent=2))
    config = {
        "add_prefix_space": False,
        **{name: {"__type": "AddedToken", **token} for name, token in special_tokens.items()},
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": 77,
        "pad_token": pad_token,
        "tokenizer_class": "CLIPTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return CLIPTokenizer.from_pretrained(folder)
