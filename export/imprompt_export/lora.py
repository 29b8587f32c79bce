"""Read LoRAs in the formats of kohya, diffusers, PEFT, and ComfyUI, and fuse them into the base or keep them apart.

A weight becomes W + scale * alpha / rank * up @ down (https://arxiv.org/abs/2106.09685). With DoRA, each row of the
result is rescaled to a learned magnitude (https://arxiv.org/abs/2402.09353). Every tensor of a file must be used: if a
part were left out, pictures would differ without anybody noticing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from imprompt_export import checkpoint_kinds
from imprompt_export.errors import BundleError, some_of
from imprompt_export.sources import flat

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]
Targets = Mapping[str, Mapping[str, Shape]]
"""Shapes of the base's weights, by component (`unet`, `text_encoder`, `text_encoder_2`) and layer."""

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
_FACTOR = re.compile(r"(?P<layer>.+?)[._]lora(?:_linear_layer)?[._](?P<role>down|up|A|B)(?:\.[A-Za-z0-9_]+)?\.weight")
_ROLES = {"A": "down", "B": "up"}
_MAGNITUDE = re.compile(r"(?P<layer>.+?)[._](dora_scale|lora_magnitude_vector(\.[A-Za-z0-9_]+)??(\.weight)?)")
"""kohya's and PEFT's name for the magnitudes of DoRA."""
_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder",
    "unet.": "unet",
    "model.diffusion_model.": "unet",
    "diffusion_model.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
}
_LDM_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_LDM_OTHERS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


class Update(NamedTuple):
    """An update of the weight of `layer` in `component`, as the names of its tensors in the file."""

    component: str
    layer: str
    down: str
    up: str
    alpha: str | None
    magnitude: str | None = None


def factors(what: str, tensors: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return the names of the tensors of each layer: `down`, `up`, and optionally `alpha` and `magnitude` (DoRA).

    Raises:
        BundleError: the file is not a LoRA, or also holds something else.
    """
    layers: dict[str, dict[str, str]] = {}
    others = []
    for name in tensors:
        if match := _FACTOR.fullmatch(name):
            role = _ROLES.get(match["role"], match["role"])
            layers.setdefault(match["layer"], {})[role] = name
        elif name.endswith(".alpha"):
            layers.setdefault(name.removesuffix(".alpha"), {})["alpha"] = name
        elif match := _MAGNITUDE.fullmatch(name):
            layers.setdefault(match["layer"], {})["magnitude"] = name
        else:
            others.append(name)
    if others:
        kind = checkpoint_kinds.kind_of_tensors(others)
        kind = checkpoint_kinds.kind_of_tensors(tensors) if kind.endswith("layout") else kind
        if kind != "a LoRA":
            raise BundleError(f"{what} is {kind} ({others[0]}), not a LoRA")
        raise BundleError(f"{what} has parts that cannot be applied: {some_of(others, 2)}")
    if not layers:
        raise BundleError(f"{what} is {checkpoint_kinds.kind_of_tensors(tensors)}, not a LoRA")
    for layer, names in layers.items():
        for role in ("down", "up"):
            if role not in names:
                raise BundleError(f"{what} is incomplete: {layer} has no {role} weights")
    return layers


def plan(what: str, tensors: Mapping[str, Any], targets: Targets) -> list[Update]:
    """Match the tensors of a LoRA file to the weights of the base.

    Args:
        what: the name of the file in messages.
        tensors: its tensors, or anything else with a `shape`.
        targets: the shapes of the base's weights.

    Raises:
        BundleError: the file is not a LoRA, or some of it does not fit.
    """
    layers, index = factors(what, tensors), {name: _aliases(name, shapes) for name, shapes in targets.items()}
    updates, unknown = [], []
    for layer, names in layers.items():
        found = _find(layer, index)
        if found is None:
            unknown.append(layer)
            continue
        shape, down, up = targets[found[0]][found[1]], tensors[names["down"]].shape, tensors[names["up"]].shape
        if not _fits(tuple(shape), tuple(down), tuple(up)):
            raise BundleError(
                f"{what}: {layer} is made for weights of {up[0]} x {down[1]}, but those of the base are {shape[0]} x "
                f"{shape[1]}; it is made for another family"
            )
        magnitude = names.get("magnitude")
        if magnitude is not None and not _one_per_row(
            tensors[magnitude].shape, shape[0], kohya="dora_scale" in magnitude
        ):
            raise BundleError(
                f"{what}: {magnitude} has the shape {list(tensors[magnitude].shape)}, not one magnitude for each of "
                f"the {shape[0]} rows of the weight; such DoRAs are not supported"
            )
        updates.append(Update(*found, names["down"], names["up"], names.get("alpha"), magnitude))
    if unknown:
        raise BundleError(
            f"{what}: {len(unknown)} of its {len(layers)} layers are not in the base, such as {some_of(unknown, 2)}; "
            "it is made for another family"
        )
    twice = {update[:2] for update in updates}
    if len(twice) < len(updates):
        raise BundleError(f"{what} has weights for the same layers under different names")
    return updates


class Factors(NamedTuple):
    """The change of one weight at scale 1, `up @ down`. `up` includes alpha / rank.

    `down` has the shape of the weight, but its first axis is the rank; `up` is [outputs, rank].
    """

    down: torch.Tensor
    up: torch.Tensor


class Change(NamedTuple):
    """What a LoRA does to one weight: it adds `factors`, and rescales the rows to `magnitude` [outputs] (DoRA)."""

    factors: Factors
    magnitude: torch.Tensor | None


def fuse(what: str, file: Path, scale: float, pipeline: Any) -> None:
    """Add the LoRA in `file`, times `scale`, to the weights of a diffusers `pipeline`.

    Raises:
        BundleError: the file is not a LoRA, or some of it does not fit.
    """
    import torch

    weights = _weights(pipeline)
    with torch.no_grad():
        for (component, layer), ((down, up), magnitude) in _read_changes(what, file, weights).items():
            weight = weights[component][layer]
            weight += scale * (up @ down.flatten(1)).reshape(weight.shape)
            if magnitude is not None:
                norm = torch.linalg.vector_norm(weight.flatten(1), dim=1)
                weight *= (magnitude / norm).reshape(-1, *[1] * (weight.dim() - 1))


def unet_factors(what: str, file: Path, pipeline: Any) -> dict[str, Factors]:
    """Return the factors of the LoRA in `file` for the UNet of a diffusers `pipeline`, by layer.

    Raises:
        BundleError: the file is not a LoRA, some of it does not fit, or requests cannot choose it.
    """
    changes = _read_changes(what, file, _weights(pipeline))
    check_choosable(what, [(component, change.magnitude) for (component, _), change in changes.items()])
    return {layer: change.factors for (_, layer), change in changes.items()}


def check_choosable(what: str, changes: Collection[tuple[str, Any]]) -> None:
    """Refuse a LoRA for requests to choose if it changes text encoders, or rescales weights (DoRA).

    Text encoders run as separate models, whose outputs are cached, so their weights cannot change. The changes of
    several LoRAs are added up, and those of a DoRA cannot be.

    Args:
        changes: the component of each of its layers, and the magnitudes of a DoRA.

    Raises:
        BundleError: one of the layers is in a text encoder, or has magnitudes.
    """
    others = [component for component, _ in changes if component != "unet"]
    if others:
        raise BundleError(
            f"{what}: {len(others)} of its layers are in the {others[0]}; requests can only choose LoRAs of the UNet: "
            "fuse this one (fused = true)"
        )
    if any(magnitude is not None for _, magnitude in changes):
        raise BundleError(f"{what} is a DoRA, which requests cannot choose: fuse this one (fused = true)")


def _weights(pipeline: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Return the weights that a LoRA may change, by component and layer."""
    from torch import nn

    weights = {}
    for name in COMPONENTS:
        modules = getattr(pipeline, name, nn.Module()).named_modules()
        weights[name] = {layer: m.weight for layer, m in modules if isinstance(m, nn.Linear | nn.Conv2d)}
    return weights


def _read_changes(
    what: str, file: Path, weights: Mapping[str, Mapping[str, torch.Tensor]]
) -> dict[tuple[str, str], Change]:
    """Return the changes that the LoRA in `file` makes to `weights`, by component and layer."""
    tensors, settings = read(file), _settings(file)
    targets = {name: {layer: tuple(w.shape) for layer, w in found.items()} for name, found in weights.items()}
    changes = {}
    for update in plan(what, tensors, targets):
        down, up = tensors[update.down].float(), tensors[update.up].float().flatten(1)
        alpha = None if update.alpha is None else float(tensors[update.alpha])
        strength = _strength(settings.get(update.component, {}), update.layer, alpha, len(down))
        shape = targets[update.component][update.layer][1:]
        magnitude = None if update.magnitude is None else tensors[update.magnitude].float().flatten()
        factors = Factors(down.reshape(-1, *shape), strength * up)
        changes[update.component, update.layer] = Change(factors, magnitude)
    return changes


def read(file: Path) -> dict[str, Any]:
    """Read the tensors of a weight file without running any code in it."""
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    import torch

    return flat(torch.load(file, map_location="cpu", weights_only=True))


def _fits(weight: Shape, down: Shape, up: Shape) -> bool:
    """Return whether the factors fit the weight; a linear layer counts as a 1 x 1 convolution, and the reverse."""
    if len(down) < 2 or len(up) < 2 or up[1] != down[0] or any(size != 1 for size in up[2:]):
        return False
    return up[0] == weight[0] and _plain(down[1:]) == _plain(weight[1:])


def _one_per_row(magnitude: Shape, rows: int, *, kohya: bool) -> bool:
    """Return whether a DoRA has a magnitude for each row of the weight, and not for each column.

    kohya's scripts write [rows, 1, ...], and PEFT [rows] or for convolutions [1, rows, 1, 1].
    """
    shape = tuple(magnitude)
    padded = (rows, *[1] * (len(shape) - 1)) if kohya or len(shape) < 2 else (1, rows, *[1] * (len(shape) - 2))
    return shape == padded


def _plain(shape: Shape) -> Shape:
    return shape[:1] if all(size == 1 for size in shape[1:]) else shape


def _find(layer: str, index: Mapping[str, Mapping[str, str]]) -> tuple[str, str] | None:
    """Return the component and the name of the layer that a file calls `layer`."""
    name = layer.removeprefix("base_model.model.")
    component = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
    candidates = COMPONENTS if component is None else (_PREFIXES[component],)
    name = name.removeprefix(component or "").replace(".processor.", ".").replace(".", "_")
    for candidate in candidates:
        known = index.get(candidate, {})
        for spelling in (name, f"{name}_0"):  # old diffusers files call to_out.0 to_out
            if spelling in known:
                return candidate, known[spelling]
    return None


def _aliases(component: str, layers: Mapping[str, Shape]) -> dict[str, str]:
    """Map every name that a file may use for a layer of a component, with underscores, to the layer."""
    names = {name: name for name in layers}
    if component == "unet":
        names |= {old: name for name in layers if (old := _ldm_name(name, layers))}
    else:
        # transformers 5 dropped the prefix `text_model`.
        names |= {f"text_model.{name.removeprefix('text_model.')}": name for name in layers}
        names |= {name.removeprefix("text_model."): name for name in layers}
    return {name.replace(".", "_"): layer for name, layer in names.items()}


def _ldm_name(name: str, layers: Mapping[str, Shape]) -> str | None:
    """Return the name of a UNet layer in Stability's own code, which ComfyUI and kohya's SDXL scripts use as well."""
    kind, *parts = name.split(".")
    if len(parts) < 3:
        return _LDM_OTHERS.get(name)
    if kind == "mid_block":
        block, index, *rest = parts
        place = f"middle_block.{1 if block == 'attentions' else 2 * int(index)}"
    elif kind in ("down_blocks", "up_blocks"):
        level, block, index, *rest = parts
        count = sum(f"{kind}.0.resnets.{i}.conv1" in layers for i in range(8))
        attends = any(layer.startswith(f"{kind}.{level}.attentions.") for layer in layers)
        if block == "downsamplers":
            return f"input_blocks.{(int(level) + 1) * (count + 1)}.0.op"
        if block == "upsamplers":
            return f"output_blocks.{int(level) * count + count - 1}.{1 + attends}.conv"
        number = int(level) * count + int(index) if kind == "up_blocks" else 1 + int(level) * (count + 1) + int(index)
        side = "input" if kind == "down_blocks" else "output"
        place = f"{side}_blocks.{number}.{int(block == 'attentions')}"
    else:
        return None
    inner = ".".join(rest)
    return f"{place}.{_LDM_RESNET.get(inner, inner) if block == 'resnets' else inner}"


def _settings(file: Path) -> dict[str, dict[str, Any]]:
    """Read the PEFT settings of a LoRA, by component: from the file itself (diffusers) or `adapter_config.json`."""
    beside = file.with_name("adapter_config.json")
    if file.stem == "adapter_model" and beside.is_file():
        return dict.fromkeys(COMPONENTS, json.loads(beside.read_text(encoding="utf-8")))
    if file.suffix != ".safetensors":
        return {}
    from safetensors import safe_open

    with safe_open(file, framework="np") as opened:
        kept = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    return {
        name: {key.removeprefix(f"{name}."): value for key, value in kept.items() if key.startswith(f"{name}.")}
        for name in COMPONENTS
    }


def _strength(settings: Mapping[str, Any], layer: str, alpha: float | None, rank: int) -> float:
    """Return alpha over rank (rsLoRA: over its square root), or 1 if neither file nor settings have an alpha."""
    if alpha is None:
        alpha = settings.get("lora_alpha", rank)
        for pattern, value in (settings.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", layer):
                alpha = value
    return float(alpha) / (rank**0.5 if settings.get("use_rslora") else rank)
