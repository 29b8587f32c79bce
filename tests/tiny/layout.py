"""Turns what today's libraries save into what the public repositories hold."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

# transformers 5 saves these without the outer name that the public files have, and reads both.
OUTER_NAMES = {
    "text_encoder": ("embeddings.", "encoder.", "final_layer_norm."),
    "safety_checker": ("vision_model.",),
}
PREFIXES = {"text_encoder": "text_model.", "safety_checker": "vision_model."}


def as_published(folder: Path) -> None:
    """Renames weights, and the class that transformers falls back to where torchvision is missing."""
    for component, starts in OUTER_NAMES.items():
        path = folder / component / "model.safetensors"
        if path.exists():
            weights = load_file(path)
            renamed = {PREFIXES[component] * key.startswith(starts) + key: value for key, value in weights.items()}
            save_file(renamed, path, metadata={"format": "pt"})
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("CLIPImageProcessorPil", "CLIPImageProcessor"))


def write_scheduler(folder: Path, config: dict[str, Any]) -> None:
    """Writes the configuration by hand: `save_pretrained` drops what the class itself does not know.

    `clip_sample` is such a value: PNDM has no use for it, but a DDIM scheduler made from this configuration has.
    """
    config = {
        "_diffusers_version": "0.6.0",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "steps_offset": 1,
        "trained_betas": None,
        **config,
    }
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(dict(sorted(config.items())), indent=2))
