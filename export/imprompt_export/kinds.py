"""What a folder or a file of a checkpoint is: by its configuration, or by the names of its tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from imprompt_export.errors import BundleError
from imprompt_export.sources import WEIGHTS, find, flat, is_local, read_json, tensors

_CLASSES = {
    "ControlNetModel": "a ControlNet",
    "ControlNetUnionModel": "a ControlNet union, which is not served",
    "ControlNetXSAdapter": "a ControlNet-XS, which is not served",
    "T2IAdapter": "a T2I-Adapter",
    "MultiAdapter": "a set of T2I-Adapters",
    "MotionAdapter": "a motion adapter",
    "UNet2DConditionModel": "a UNet",
    "UNetMotionModel": "a motion UNet",
    "AutoencoderKL": "a VAE",
}
"""By `_class_name` in a `config.json` of diffusers."""
_ARCHITECTURES = {
    "CLIPVisionModelWithProjection": "a CLIP image encoder",
    "CLIPVisionModel": "a CLIP image encoder without its projection",
    "CLIPTextModel": "a CLIP text encoder",
    "CLIPTextModelWithProjection": "a CLIP text encoder",
    "StableDiffusionSafetyChecker": "a safety checker",
}
"""By `architectures` in a `config.json` of transformers."""
_MODEL_FILE = re.compile(r"(diffusion_pytorch_model|pytorch_model|model)(-\d+-of-\d+)?\.(safetensors|bin)")
"""Files that diffusers and transformers load."""
_KEYS = (
    (r"(image_proj|ip_adapter)\.", "an IP-Adapter"),
    (r".*\.lokr_", "a LoKr"),
    (r".*\.hada_", "a LoHa"),
    (r".*\.oft_", "an OFT network"),
    (r".*(lora_magnitude_vector|\.dora_scale)", "a DoRA"),
    (r".*[._]lora[._]", "a LoRA"),
    (r".*lora_(down|up|A|B|linear_layer)", "a LoRA"),
    (r".*motion_modules\.", "a motion adapter"),
    (r"(model\.diffusion_model|cond_stage_model)\.", "a checkpoint in a single file"),
    (r"(control_model\.|controlnet_|input_hint_block)", "a ControlNet"),
    (r"adapter\.(body|conv_in)\.", "a T2I-Adapter"),
    (r"(vision_model|visual_projection)", "a CLIP image encoder"),
    (r"(text_model|text_projection)\.", "a CLIP text encoder"),
    (r"(down_blocks|time_embedding)\.", "a UNet"),
    (r"(encoder|decoder)\.", "a VAE"),
    (r"(emb_params|string_to_param|clip_[gl]$)", "an embedding of textual inversion"),
)
"""By the beginning of the name of any tensor; the first that is found counts."""


def of_names(names: Iterable[str]) -> str:
    """What a file of tensors with these `names` is."""
    known = list(names)
    for pattern, kind in _KEYS:
        if any(re.match(pattern, name) for name in known):
            return kind
    return "a file of tensors of an unknown layout" if known else "a file without tensors"


def describe(path: Path) -> str:
    """What the folder or file at `path` is, as the end of a sentence."""
    if path.is_file():
        try:
            content = tensors("", path)
        except BundleError:
            return "a damaged file" if path.suffix in WEIGHTS else f"a {path.suffix} file"
        return "a file of an old torch" if content is None else of_names(flat(content))
    if (path / "model_index.json").is_file():
        return f"a diffusers pipeline ({_json(path / 'model_index.json').get('_class_name')})"
    if (path / "config.json").is_file():
        return _of_config(_json(path / "config.json"))
    if (path / "adapter_config.json").is_file():
        return "a LoRA of PEFT"
    if (path / "scheduler_config.json").is_file():
        return "a scheduler"
    entries = sorted(path.iterdir())
    for entry in entries:
        if entry.suffix in (".safetensors", ".bin"):
            return f"a folder with {entry.name}, which is {describe(entry)}"
    return f"a folder with {entries[0].name}" if entries else "an empty folder"


def _of_config(config: dict[str, Any]) -> str:
    name = config.get("_class_name")
    if name is not None:
        return _CLASSES.get(name, f"a {name}")
    architecture = next(iter(config.get("architectures") or ()), None)
    if architecture is None:
        return "a folder whose config.json names no class"
    return _ARCHITECTURES.get(architecture, f"a {architecture}")


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return {}
    return content if isinstance(content, dict) else {}


def model_config(what: str, root: str, subfolder: str, wanted: str) -> dict[str, Any]:
    """The `config.json` of a model, which must be one that `wanted` names: `a ControlNet`, say.

    Configurations that name no class are taken as they are: loading tells.

    Raises:
        BundleError: there is no such file, or it is that of something else.
    """
    place = "/".join(filter(None, (subfolder, "config.json")))
    if is_local(root):
        folder = Path(root, subfolder)
        if not folder.exists():
            raise BundleError(f"{what}: no folder {folder}")
        if folder.is_file():
            raise BundleError(f"{what}: {folder} is {describe(folder)}; wanted is the folder of {wanted}")
        if not (folder / "config.json").is_file():
            raise BundleError(f"{what}: no config.json in {folder}, which is {describe(folder)}; wanted is {wanted}")
    config = read_json(what, root, place)
    kind = _of_config(config)
    named = config.get("_class_name") is not None or config.get("architectures")
    if named and kind != wanted:
        raise BundleError(f"{what}: {Path(root, subfolder)} is {kind}; wanted is {wanted}")
    return config


def check_weights(what: str, folder: Path) -> None:
    """Refuse a model without weights, or with damaged ones, such as those of a download that was broken off."""
    if not (folder / "config.json").is_file():
        return  # no model: a tokenizer, a scheduler
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (".safetensors", ".bin")]
    if not any(_MODEL_FILE.fullmatch(file.name) for file in files):
        there = f"; {files[0].name} is not a name that is looked for" if files else ""
        raise BundleError(f"{what}: no weights in {folder}{there}")
    for file in files:
        if file.suffix == ".safetensors":
            tensors(what, file)


def pipeline_index(what: str, root: str) -> dict[str, Any]:
    """The `model_index.json` of a diffusers pipeline; the weights of its parts are there and whole.

    Raises:
        BundleError: `root` is something else, or a part of it is missing or damaged.
    """
    if is_local(root):
        folder = Path(root)
        if not (folder / "model_index.json").is_file():
            hint = "; convert a single file with diffusers' from_single_file and save_pretrained"
            raise BundleError(
                f"{what}: {folder} cannot be loaded as a diffusers pipeline: it is {describe(folder)}"
                + (hint if folder.is_file() else ", without model_index.json")
            )
    else:
        find(what, root, "model_index.json")
    index = read_json(what, root, "model_index.json")
    for part, kind in index.items() if is_local(root) else ():
        if not part.startswith("_") and isinstance(kind, list) and all(kind):
            if not Path(root, part).is_dir():
                raise BundleError(f"{what}: no folder {part} in {root}, which its model_index.json names")
            check_weights(what, Path(root, part))
    return index
