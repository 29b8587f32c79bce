"""Textual inversion embeddings in the layouts in which they are published."""

from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

from .weights import generator, normal

Layout = Literal["diffusers", "a1111", "emb_params", "sdxl"]


def make_embedding(
    folder: str | Path,
    *,
    layout: Layout = "diffusers",
    token: str = "<toy>",
    vectors: int = 3,
    width: int = 48,
    weight_name: str | None = None,
    seed: int = 0,
) -> Path:
    """Write an embedding of several `vectors`, or of one, and return its path.

    `diffusers` is a file with one tensor named after the token, `a1111` and `emb_params` are the two formats of
    AUTOMATIC1111, and `sdxl` has one tensor per text encoder. The last two do not name the token.
    """
    rng = generator(seed + 40)
    embedding = normal(rng, vectors, width)
    path = Path(folder) / (weight_name or ("embedding.pt" if layout == "a1111" else "learned_embeds.safetensors"))
    path.parent.mkdir(parents=True, exist_ok=True)
    if layout == "a1111":
        content = {"string_to_token": {"*": 265}, "string_to_param": {"*": embedding}, "name": token, "step": 100}
        torch.save(content, path)
    elif layout == "sdxl":
        save_file({"clip_l": embedding, "clip_g": normal(rng, vectors, 80)}, path)
    else:
        shape = embedding if vectors > 1 else embedding[0]
        save_file({token if layout == "diffusers" else "emb_params": shape.clone()}, path)
    return path
