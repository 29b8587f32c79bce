"""Checkpoints in single files: recognize what is in them, and find the configuration that they lack.

Names are those of Stability's own code (`model.diffusion_model.input_blocks...`), which diffusers' `from_single_file`
converts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from imprompt_export import checkpoint_kinds
from imprompt_export.errors import BundleError
from imprompt_export.sources import flat_tensors

_UNET = "model.diffusion_model."
_FIRST_LAYER = f"{_UNET}input_blocks.0.0.weight"
_PARTS = {
    "unet": (_UNET,),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.",),
}
"""Beginnings of the names of each component's tensors."""
CONFIGS: dict[tuple[int | None, int | None], str] = {
    (768, 4): "stable-diffusion-v1-5/stable-diffusion-v1-5",
    (768, 9): "stable-diffusion-v1-5/stable-diffusion-inpainting",
    (1024, 4): "stabilityai/stable-diffusion-2-1",
    (1024, 9): "stabilityai/stable-diffusion-2-inpainting",
    (2048, 4): "stabilityai/stable-diffusion-xl-base-1.0",
    (2048, 9): "diffusers/stable-diffusion-xl-1.0-inpainting-0.1",
}
"""The hub id whose configuration diffusers uses, by the width of text embeddings and the input channels of the UNet."""
_KINDS = {
    "a UNet": ("a UNet", checkpoint_kinds.WHOLE),
    "a VAE": ("a VAE", checkpoint_kinds.WHOLE),
    "a ControlNet": ("a ControlNet",),
}
"""Kinds of files that hold a network of each kind."""


def default_config(file: Path) -> str:
    """Return the hub id of the configuration for the base in `file`.

    Raises:
        BundleError: the file is not a base, or has another layout.
    """
    tensors = flat_tensors("base", file)
    if tensors is not None:
        _check_whole(file, tensors)
    found = None if tensors is None else CONFIGS.get(_layout(tensors))
    if found is None:
        raise BundleError(
            f"config: {file.name} comes without its configuration; name the diffusers folder or hub id of a model with "
            "the same layout (its weights are not used)"
        )
    return found


def check_kind(what: str, file: Path, expected: str) -> None:
    """Check that `file` holds a network of the kind `expected`, alone or among others.

    Raises:
        BundleError: it holds something else.
    """
    tensors = flat_tensors(what, file)
    if tensors is None:
        return
    kind = checkpoint_kinds.kind_of_tensors(tensors)
    if kind not in _KINDS[expected]:
        raise BundleError(f"{what}: {file} is {kind}; expected {expected}")


def check_base(file: Path, config: str, unet: Mapping[str, Any], parts: Iterable[str]) -> None:
    """Check that the base in `file` has every one of `parts`, and the layout of the configuration.

    Args:
        file: the single file.
        config: where its configuration comes from, for messages.
        unet: `cross_attention_dim` and `in_channels` of the UNet in the configuration.
        parts: the components to load from the file.

    Raises:
        BundleError: a component is missing, or the configuration is that of another model.
    """
    tensors = flat_tensors("base", file)
    if tensors is None:
        return
    _check_whole(file, tensors)
    for key, found in zip(("cross_attention_dim", "in_channels"), _layout(tensors), strict=True):
        if found not in (None, unet[key]):
            raise BundleError(
                f"config: the {key} of {file.name} is {found}, but that of {config} is {unet[key]}; name the "
                "configuration of a model with the same layout"
            )
    for part in parts:
        if not any(name.startswith(_PARTS[part]) for name in tensors):
            hint = f"; add the {part} that belongs to it in [{part}]" if part == "vae" else ""
            raise BundleError(f"base: {file} has no {part}, it is only a part of a checkpoint{hint}")


def _check_whole(file: Path, tensors: Mapping[str, Any]) -> None:
    kind = checkpoint_kinds.kind_of_tensors(tensors)
    if kind != checkpoint_kinds.WHOLE:
        raise BundleError(f"base: {file} is {kind}; expected {checkpoint_kinds.WHOLE} or a diffusers folder")


def _layout(tensors: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Return the width of the text embeddings and the input channels of the UNet; None for what is not there."""
    keys = [name for name in tensors if name.startswith(_UNET) and name.endswith("attn2.to_k.weight")]
    widths = [tensors[name].shape[1] for name in keys]
    channels = tensors[_FIRST_LAYER].shape[1] if _FIRST_LAYER in tensors else None
    return (widths[0] if widths else None), channels
