"""Recognize what a checkpoint folder or file is, from its configuration or the names of its tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from imprompt_export.errors import BundleError
from imprompt_export.sources import WEIGHTS, Source, find, flat, is_local, read_json, tensors

_CLASSES = {
    "ControlNetModel": "a ControlNet",
    "ControlNetUnionModel": "a ControlNet union, which is not supported",
    "ControlNetXSAdapter": "a ControlNet-XS, which is not supported",
    "T2IAdapter": "a T2I-Adapter",
    "MultiAdapter": "a set of T2I-Adapters",
    "MotionAdapter": "a motion adapter",
    "UNet2DConditionModel": "a UNet",
    "UNetMotionModel": "a motion UNet",
    "AutoencoderKL": "a VAE",
}
"""Kind by `_class_name` in a `config.json` of diffusers."""
_ARCHITECTURES = {
    "CLIPVisionModelWithProjection": "a CLIP image encoder",
    "CLIPVisionModel": "a CLIP image encoder without its projection",
    "CLIPTextModel": "a CLIP text encoder",
    "CLIPTextModelWithProjection": "a CLIP text encoder",
    "StableDiffusionSafetyChecker": "a safety checker",
}
"""Kind by `architectures` in a `config.json` of transformers."""
WHOLE = "a checkpoint in a single file"
_MODEL_FILE = re.compile(
    r"(diffusion_pytorch_model|pytorch_model|model)(\.(?P<variant>\w+))?(-\d+-of-\d+)?(\.(?P<after>\w+))?\.(safetensors|bin)"
)
"""Names of the weight files that diffusers and transformers load; a variant stands before or after numbers of parts."""
_TENSOR_NAMES = (
    (r"(image_proj|ip_adapter)\.", "an IP-Adapter"),
    (r".*\.lokr_", "a LoKr"),
    (r".*\.hada_", "a LoHa"),
    (r".*\.oft_", "an OFT network"),
    (r".*(lora_magnitude_vector|\.dora_scale)", "a DoRA"),
    (r".*[._]lora[._]", "a LoRA"),
    (r".*lora_(down|up|A|B|linear_layer)", "a LoRA"),
    (r".*motion_modules\.", "a motion adapter"),
    (r"control_model\.", "a ControlNet"),  # some of these files hold the base as well
    (r"(model\.diffusion_model|cond_stage_model)\.", WHOLE),
    (r"(controlnet_|input_hint_block)", "a ControlNet"),
    (r"adapter\.(body|conv_in)\.", "a T2I-Adapter"),
    (r"(vision_model|visual_projection)", "a CLIP image encoder"),
    (r"(text_model|text_projection)\.", "a CLIP text encoder"),
    (r"(down_blocks|time_embedding)\.", "a UNet"),
    (r"(first_stage_model\.)?(encoder|decoder)\.", "a VAE"),
    (r"(emb_params|string_to_param|clip_[gl]$)", "a textual inversion embedding"),
)
"""Kind by the beginning of any tensor's name; the first pattern that matches wins."""


def kind_of_tensors(names: Iterable[str]) -> str:
    """Return the kind of a file whose tensors have these `names`."""
    known = list(names)
    for pattern, kind in _TENSOR_NAMES:
        if any(re.match(pattern, name) for name in known):
            return kind
    return "a file of tensors with an unknown layout" if known else "a file without tensors"


def describe(path: Path) -> str:
    """Describe the folder or file at `path`, as the end of a sentence."""
    if path.is_file():
        try:
            content = tensors("", path)
        except BundleError:
            return "a damaged file" if path.suffix in WEIGHTS else f"a {path.suffix} file"
        return "a file in an old torch format" if content is None else kind_of_tensors(flat(content))
    if (path / "model_index.json").is_file():
        return f"a diffusers pipeline ({_json(path / 'model_index.json').get('_class_name')})"
    if (path / "config.json").is_file():
        return _kind_of_config(_json(path / "config.json"))
    if (path / "adapter_config.json").is_file():
        return "a PEFT LoRA"
    if (path / "scheduler_config.json").is_file():
        return "a scheduler"
    entries = sorted(path.iterdir())
    for entry in entries:
        if entry.suffix in (".safetensors", ".bin"):
            return f"a folder with {entry.name}, which is {describe(entry)}"
    return f"a folder with {entries[0].name}" if entries else "an empty folder"


def _kind_of_config(config: dict[str, Any]) -> str:
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


def model_config(what: str, root: str, subfolder: str, expected: str) -> dict[str, Any]:
    """Read the `config.json` of a model and check that the model is of the kind `expected`, such as `a ControlNet`.

    A configuration that names no class passes; loading the model will show whether it is right.

    Raises:
        BundleError: there is no such file, or the model is of another kind.
    """
    place = "/".join(filter(None, (subfolder, "config.json")))
    if is_local(root):
        folder = Path(root, subfolder)
        if not folder.exists():
            raise BundleError(f"{what}: no folder {folder}")
        if folder.is_file():
            raise BundleError(f"{what}: {folder} is {describe(folder)}; expected the folder of {expected}")
        if not (folder / "config.json").is_file():
            raise BundleError(f"{what}: no config.json in {folder}, which is {describe(folder)}; expected {expected}")
    config = read_json(what, root, place)
    kind = _kind_of_config(config)
    named = config.get("_class_name") is not None or config.get("architectures")
    if named and kind != expected:
        raise BundleError(f"{what}: {Path(root, subfolder)} is {kind}; expected {expected}")
    return config


def check_weights(what: str, folder: Path, variant: str | None = None) -> bool:
    """Check that the model in `folder` has weights, and that they are not damaged, for example by a broken download.

    Returns:
        Whether the weights are those of `variant`. As diffusers does, take others if there are none of the variant.

    Raises:
        BundleError: there are no weights, or a file is damaged.
    """
    if not (folder / "config.json").is_file():
        return False  # not a model but a tokenizer or a scheduler
    files = {file: _variant(file.name) for file in sorted(folder.iterdir()) if file.suffix in (".safetensors", ".bin")}
    if not {None, variant} & {*files.values()}:
        hint = ""
        if named := next((found for found in files.values() if found), None):
            hint = f'; it has those of variant = "{named}"'
        elif files:
            hint = f"; {next(iter(files)).name} is not a name that diffusers or transformers load"
        raise BundleError(f"{what}: no weights in {folder}{hint}")
    chosen = variant if variant in files.values() else None
    for file, found in files.items():
        if found == chosen and file.suffix == ".safetensors":
            tensors(what, file)
    return chosen is not None


def _variant(name: str) -> str | None:
    """Return the variant of a weight file; None without one, empty if neither diffusers nor transformers load it."""
    found = _MODEL_FILE.fullmatch(name)
    return "" if found is None else found["variant"] or found["after"]


def pipeline_index(what: str, source: Source, replaced: Collection[str] = ()) -> dict[str, Any]:
    """Read the `model_index.json` of a diffusers pipeline, and check that none of its parts is missing or damaged.

    Args:
        what: the name of the pipeline in messages.
        source: where it is. If its weights are in a single file, only its configurations are checked.
        replaced: parts that are not loaded from it.

    Raises:
        BundleError: `source` is something else, or a part of it is missing or damaged.
    """
    root = str(source.config)
    if is_local(root):
        folder = Path(root)
        if not (folder / "model_index.json").is_file():
            raise BundleError(
                f"{what}: {folder} cannot be loaded as a diffusers pipeline: it is {describe(folder)}"
                + (", without model_index.json" if folder.is_dir() else "")
            )
    else:
        find(what, root, "model_index.json")
    index = read_json(what, root, "model_index.json")
    variants = []
    for part, kind in index.items() if is_local(root) else ():
        if not part.startswith("_") and isinstance(kind, list) and all(kind) and part not in replaced:
            if not Path(root, part).is_dir():
                raise BundleError(f"{what}: no folder {part} in {root}, which its model_index.json names")
            if source.file is None:
                variants.append(check_weights(what, Path(root, part), source.variant))
    if source.variant is not None and variants and not any(variants):
        raise BundleError(f'variant: no part of {root} has weights of the variant "{source.variant}"')
    return index
