"""Describe how a picture was made, for the text chunks of PNG files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_TITLES = {
    "num_inference_steps": "Steps",
    "scheduler": "Sampler",
    "guidance_scale": "CFG scale",
    "strength": "Denoising strength",
    "clip_skip": "Clip skip",
}
"""Names of parameters in the text that Stable Diffusion web UIs write and read."""


def provenance(
    *,
    model: str,
    parameters: Mapping[str, Any],
    seeds: Sequence[int],
    index: int,
    count: int,
    size: tuple[int, int],
    version: str,
) -> dict[str, str]:
    """Return texts by keyword for picture `index` of `count`.

    `parameters` is a line of text in the form of Stable Diffusion web UIs, and `imprompt` is JSON with all parameters
    of the request by name. Both leave out pictures and parameters that the request did not give.
    """
    own = {name: _own(name, value, index, count, parameters) for name, value in parameters.items()}
    if seeds:
        own["seed"] = seeds[index]
    entries = {title: own[name] for name, title in _TITLES.items() if name in own}
    entries |= {"Seed": own["seed"]} if "seed" in own else {}
    entries |= {"Size": f"{size[0]}x{size[1]}", "Model": model}
    if count > 1 and not seeds:  # one seed for all pictures: it takes the whole batch to repeat one of them
        entries |= {"Batch size": count, "Batch pos": index}
        own |= {"picture": index}
    entries["Version"] = f"imprompt {version}"
    lines = [str(own.get("prompt", ""))]
    if own.get("negative_prompt"):
        lines.append(f"Negative prompt: {own['negative_prompt']}")
    lines.append(", ".join(f"{title}: {value}" for title, value in entries.items()))
    return {"parameters": "\n".join(lines), "imprompt": json.dumps({"model": model, **own}, ensure_ascii=False)}


def _own(name: str, value: Any, index: int, count: int, parameters: Mapping[str, Any]) -> Any:
    """Return the part of a parameter that belongs to one picture: its own prompt, of several."""
    if "prompt" not in name or not isinstance(value, list):
        return value
    prompts = parameters["prompt"]
    per_prompt = max(count // (len(prompts) if isinstance(prompts, list) else 1), 1)
    return value[min(index // per_prompt, len(value) - 1)]
