"""Check that the checkpoints of a bundle exist, are of the right kind, and fit together.

The checks only read configurations and the names and shapes of tensors, without importing torch, so that a mistake is
reported within a second or two and not after a minute of loading.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imprompt_export import adapters, checkpoint_kinds, lora, single_files, textual_inversion
from imprompt_export.backends import export_backend
from imprompt_export.bundle import NO_FACES, BundleFile
from imprompt_export.errors import BundleError, refusing
from imprompt_export.families import ExportFamily, all_families, family_of
from imprompt_export.sections import IPAdapterSection
from imprompt_export.sources import Source, flat, is_local, read_json, tensors
from imprompt_serving.backends.onnxruntime import check_one_installed

_DEFAULTS: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "latent_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 1280,
    "addition_embed_type": None,
    "adapter_type": "full_adapter",
    "transformer_layers_per_block": 1,
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "hidden_size": 768,
    "projection_dim": 512,
}
"""Defaults of the classes of diffusers and transformers for keys that a configuration omits."""


def value(config: Mapping[str, Any], key: str) -> Any:
    """Return `key` of a configuration, or the default of its class; lists become tuples."""
    found = config.get(key, _DEFAULTS[key])
    return tuple(found) if isinstance(found, list) else found


def check_options(bundle: BundleFile, refit_from: Path | None) -> None:
    """Check that this machine has what the backend needs, and that the backend supports `refit_from`.

    Raises:
        BundleError: the backend does not support `--refit-from`, or one of its packages is not installed.
        EngineError: the backend's package is missing or too old, or two ONNX Runtimes are installed.
    """
    check_one_installed()  # for every backend, because ONNX Runtime may also run the comparison
    backend = export_backend(bundle.engine.backend)
    backend.check_installed(bundle.engine)
    if refit_from is not None and not backend.refittable:
        raise BundleError(f"--refit-from only works with TensorRT engines, but engine.backend is {backend.name}")
    if refit_from is not None and not refit_from.is_dir():
        raise BundleError(f"--refit-from: no such folder: {refit_from}")


def check_checkpoints(bundle: BundleFile) -> None:
    """Check that the base can be served and that the other checkpoints fit it.

    Raises:
        BundleError: says what does not fit, and what would.
    """
    with refusing("cannot read a configuration of the checkpoints"):
        _check_base_and_parts(bundle)


def _check_base_and_parts(bundle: BundleFile) -> None:
    unet, family = check_base(bundle)
    layers, width = cross_attention_layers(unet), value(unet, "cross_attention_dim")
    kinds_of_adapters = []
    for section in bundle.ip_adapter:
        what, file = f"ip_adapter {section.name}", bundle.adapter_file(section)
        content = tensors(what, file)
        if content is not None:
            state_dict = adapters.split_parts(f"{what}: {file}", content)
            adapters.check_fit(section.name, file.name, state_dict, layers, width, _encoder(bundle, section))
            kinds_of_adapters.append(adapters.kind_of(state_dict, file.name))
    read = len(kinds_of_adapters) == len(bundle.ip_adapter)
    if bundle.face_encoder is not None and read and not any(kind.startswith("faceid") for kind in kinds_of_adapters):
        raise BundleError(NO_FACES)
    for what, source, kind in bundle.networks():
        config = _network_config(what, source)
        match kind:
            case "a ControlNet" if config is not None:
                check_controlnet(what, config, unet)
            case "a T2I-Adapter":
                check_t2i_adapter(what, config or {}, unet, family)
            case "a motion adapter" if bundle.motion_adapter is not None:
                check_motion_adapter(bundle.motion_adapter.path, config or {}, unet, family)
    _check_embeddings(bundle, family)
    targets = _lora_targets(bundle)
    for lora_section in bundle.lora:
        what, file = f"lora {lora_section.path}", bundle.lora_file(lora_section)
        content = tensors(what, file)
        if content is not None and targets is not None:
            updates = lora.plan(what, flat(content), targets)
            if not lora_section.fused:
                lora.check_choosable(what, [(update.component, update.magnitude) for update in updates])
        elif content is not None:
            lora.factors(what, flat(content))


def _check_embeddings(bundle: BundleFile, family: ExportFamily) -> None:
    root = str(bundle.base_source().config)
    encoders = [encoder for encoder, _ in family.text_encoders] if bundle.textual_inversion else []
    configs = {name: checkpoint_kinds.model_config("base", root, name, "a CLIP text encoder") for name in encoders}
    widths = {name: value(config, "hidden_size") for name, config in configs.items()}
    textual_inversion.check(bundle, widths)


def check_base(bundle: BundleFile) -> tuple[dict[str, Any], ExportFamily]:
    """Check that the base is supported; return the configuration of its UNet and its family."""
    source = bundle.base_source()
    own = {name: bundle.source(name) or source._replace(subfolder=name) for name in ("unet", "vae")}
    replaced = [name for name in own if bundle.source(name) is not None]
    index = checkpoint_kinds.pipeline_index("base", source, replaced)
    family = family_of(index.get("_class_name"), index)
    family.check_base(index)
    unet, vae = (
        checkpoint_kinds.model_config(name if name in replaced else "base", str(place.config), place.subfolder, kind)
        for (name, place), kind in zip(own.items(), ("a UNet", "a VAE"), strict=True)
    )
    if source.file is not None:
        layout = {key: value(unet, key) for key in ("cross_attention_dim", "in_channels")}
        parts = [name for name in (*own, *(encoder for encoder, _ in family.text_encoders)) if name not in replaced]
        single_files.check_base(source.file, str(source.config), layout, parts)
    channels = value(vae, "latent_channels")
    if value(unet, "in_channels") not in (channels, 2 * channels + 1):
        raise BundleError(
            f"base: a UNet with {value(unet, 'in_channels')} input channels is not supported; "
            f"it must have {channels} (text-to-image) or {2 * channels + 1} (inpainting)"
        )
    return unet, family


def cross_attention_layers(unet: Mapping[str, Any]) -> int:
    """Count the layers of a UNet with this configuration that attend to the prompts."""
    down, up = value(unet, "down_block_types"), value(unet, "up_block_types")
    depths, layers = value(unet, "transformer_layers_per_block"), value(unet, "layers_per_block")
    depths, layers = (each if isinstance(each, tuple) else (each,) * len(down) for each in (depths, layers))
    middle = depths[-1] if unet.get("mid_block_type", "UNetMidBlock2DCrossAttn") == "UNetMidBlock2DCrossAttn" else 0
    on_the_way_down = sum(d * n for block, d, n in zip(down, depths, layers, strict=True) if "CrossAttn" in block)
    backwards = zip(up, reversed(depths), reversed(layers), strict=True)
    return middle + on_the_way_down + sum(d * (n + 1) for block, d, n in backwards if "CrossAttn" in block)


def check_controlnet(what: str, net: Mapping[str, Any], unet: Mapping[str, Any]) -> None:
    """Check that the inputs and residuals of a ControlNet, which messages call `what`, are those of the UNet."""
    required = {"in_channels": value(unet, "out_channels")}
    for key in ("cross_attention_dim", "block_out_channels", "layers_per_block", "addition_embed_type"):
        required[key] = value(unet, key)
    for key, expected in required.items():
        actual = value(net, key)
        if actual != expected:
            raise BundleError(
                f"{what}: its {key} is {_shown(actual)}, but the base needs {_shown(expected)}; it is made "
                "for another family"
            )


def check_t2i_adapter(what: str, adapter: Mapping[str, Any], unet: Mapping[str, Any], family: ExportFamily) -> None:
    """Check that the features of a T2I-Adapter, which messages call `what`, are those that the UNet takes."""
    kind = value(adapter, "adapter_type")
    actual, expected = value(adapter, "channels"), value(unet, "block_out_channels")
    expected += expected[-1:] if family.adapts_middle else ()
    if actual != expected or (kind == "full_adapter_xl") != family.adapts_middle:
        raise BundleError(
            f"{what}: it is a {kind} with channels {_shown(actual)}, but the base needs "
            f"{_shown(expected)}; it is made for another family"
        )


def check_motion_adapter(path: str, adapter: Mapping[str, Any], unet: Mapping[str, Any], family: ExportFamily) -> None:
    """Check that the UNet supports motion adapters and that this one fits it."""
    if not family.clips or value(unet, "in_channels") != value(unet, "out_channels"):
        supported = ", ".join(known.title for known in all_families() if known.clips)
        raise BundleError(f"motion_adapter: clips are only supported for {supported} bases without a mask input")
    actual, expected = value(adapter, "block_out_channels"), value(unet, "block_out_channels")
    if actual != expected:
        raise BundleError(
            f"motion_adapter: {path} does not fit the base: its block_out_channels are {_shown(actual)}, but those of "
            f"the base are {_shown(expected)}"
        )


def _shown(configured: Any) -> str:
    return str(list(configured) if isinstance(configured, tuple) else configured)


def _network_config(what: str, source: Source) -> dict[str, Any] | None:
    """Check the weights of a network that are on this machine, and read its configuration; None if it has none."""
    if source.config is None:
        return None
    if source.file is None and is_local(source.config):
        folder = Path(source.config, source.subfolder)
        if not checkpoint_kinds.check_weights(what, folder, source.variant) and source.variant is not None:
            raise BundleError(f'{what}: no weights of the variant "{source.variant}" in {folder}')
    return read_json(what, source.config, "/".join(filter(None, (source.subfolder, "config.json"))))


def _encoder(bundle: BundleFile, section: IPAdapterSection) -> dict[str, Any] | None:
    place = bundle.image_encoder(section)
    if place is None:
        return None
    what = f"ip_adapter {section.name}"
    if is_local(place[0]):
        checkpoint_kinds.check_weights(what, Path(*place))
    config = read_json(what, place[0], f"{place[1]}/config.json")
    return {key: value(config, key) for key in ("hidden_size", "projection_dim")}


def _lora_targets(bundle: BundleFile) -> lora.Targets | None:
    """Return the shapes of the weights of the base; None if they are not in folders of safetensors on this machine."""
    source = bundle.base_source()
    root = str(source.config)
    targets: dict[str, dict[str, tuple[int, ...]]] = {}
    for component in lora.COMPONENTS if is_local(root) and source.file is None else ():
        folder = Path(root, component)
        names: dict[str, Any] = {}
        for file in sorted(folder.glob("*.safetensors")):
            names |= tensors("base", file) or {}
        if folder.is_dir() and not names:
            return None
        shapes = {name.removesuffix(".weight"): info.shape for name, info in names.items() if name.endswith(".weight")}
        targets[component] = {name: shape for name, shape in shapes.items() if len(shape) > 1}
    return targets or None
