"""Convert folders saved by current libraries to the layout of the public repositories."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

# transformers 5 saves these weights without the prefix that the public files have, and reads both forms.
OUTER_NAMES = {
    "text_encoder": ("embeddings.", "encoder.", "final_layer_norm."),
    "safety_checker": ("vision_model.",),
}
PREFIXES = {"text_encoder": "text_model.", "safety_checker": "vision_model."}


def as_published(folder: Path) -> None:
    """Rename weights, and the class that transformers falls back to if torchvision is missing."""
    for component, starts in OUTER_NAMES.items():
        path = folder / component / "model.safetensors"
        if path.exists():
            weights = load_file(path)
            renamed = {PREFIXES[component] * key.startswith(starts) + key: value for key, value in weights.items()}
            save_file(renamed, path, metadata={"format": "pt"})
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("CLIPImageProcessorPil", "CLIPImageProcessor"))


def as_variant(folder: Path, variant: str) -> Path:
    """Replace the weights of a pipeline by a variant in half precision (`model.fp16.safetensors`)."""
    for file in folder.glob("*/*.safetensors"):
        weights = {
            name: value.half() if value.is_floating_point() else value for name, value in load_file(file).items()
        }
        save_file(weights, file.with_suffix(f".{variant}.safetensors"), metadata={"format": "pt"})
        file.unlink()
    return folder


def copy_configuration(folder: Path, target: Path) -> Path:
    """Copy a pipeline without its weights."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    return target


def write_scheduler(folder: Path, config: dict[str, Any]) -> None:
    """Write the configuration by hand, because `save_pretrained` drops keys that the class does not know.

    One of these is `clip_sample`: PNDM ignores it, but a DDIM scheduler created from this configuration uses it.
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
