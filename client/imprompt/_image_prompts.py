"""Encode the image prompts of a request: which adapter each picture belongs to, and with what scale and mask."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence

from imprompt._errors import invalid, short_repr
from imprompt._images import Encoder, as_list, as_mask_list, encode, encode_all, encode_mask, to_numpy
from imprompt._model import ServedModel
from imprompt._tensors import Tensor, bytes_tensor, encode_input, is_list, is_number, numeric_tensor, to_json

PICTURES = ("ip_adapter_image", "negative_ip_adapter_image", "ip_adapter_masks")
"""Sent as flat lists; the input `<name>_adapter` names the adapter of each picture."""
VALUES = ("ip_adapter_image_per", "ip_adapter_start", "ip_adapter_end", "ip_adapter_weight_type")
EMBEDS = "ip_adapter_image_embeds"
"""Sent as one input per adapter, `ip_adapter_image_embeds_<adapter>`."""
SCALE = "ip_adapter_scale"
SCALE_CONFIG = "ip_adapter_scale_config"
"""Sent in place of `ip_adapter_scale` when that holds more than plain numbers."""

_SCALE_TYPES = "must be a number, a dict of scales by block, or a list of these"

KEYWORDS = (*PICTURES, *VALUES, EMBEDS, SCALE)
"""The keyword arguments that this module encodes."""


def encode_image_prompts(model: ServedModel, given: Mapping[str, object]) -> list[Tensor]:
    """Encode the given `KEYWORDS`, checking adapter names and sorting everything into the bundle's adapter order."""
    tensors: list[Tensor] = []
    used: set[str] = set()
    for name in PICTURES:
        if name in given:
            is_mask = name == "ip_adapter_masks"
            pictures = _split_by_adapter(name, given[name], model, as_mask_list if is_mask else as_list)
            tensors += encode_pictures(model, name, pictures, encode_mask if is_mask else encode)
            if name == "ip_adapter_image":
                used |= pictures.keys()
    if EMBEDS in given:
        embeds = _split_by_adapter(EMBEDS, given[EMBEDS], model, lambda array, _: [array])
        tensors += [_encode_embeds(model, adapter, values) for adapter, values in embeds.items()]
        used |= embeds.keys()
    adapters = [name for name in model.adapters if name in used or not used]
    if SCALE in given:
        tensors.append(_encode_scale(model, given[SCALE], adapters))
    for name in VALUES:
        if name in given:
            tensors.append(encode_input(model.inputs[name], _in_adapter_order(name, given[name], model, adapters)))
    return tensors


def _split_by_adapter(
    parameter: str, value: object, model: ServedModel, split: Callable[[object, str], list[object]]
) -> dict[str, list[object]]:
    """Assign pictures, masks or embeddings to adapters, in the bundle's order; adapters without any are left out."""
    adapters = model.adapters
    if not adapters:
        raise invalid(parameter, f"{model.bundle} has no IP-Adapter")
    if isinstance(value, Mapping):
        for name in value:
            check_adapter(parameter, name, adapters)
        entries = {name: value.get(name) for name in adapters}
    else:
        items = list(value) if is_list(value) else [value]
        if len(adapters) == 1:
            flat = [picture for item in items if item is not None for picture in split(item, parameter)]
            return {adapters[0]: flat} if flat else {}
        if len(items) != len(adapters):
            raise invalid(
                parameter,
                f"expected one entry for each adapter ({', '.join(adapters)}), or a dict keyed by adapter name; "
                f"got {len(items)}",
            )
        entries = dict(zip(adapters, items, strict=True))
    parts = {name: split(entry, parameter) for name, entry in entries.items() if entry is not None}
    return {name: part for name, part in parts.items() if part}


def encode_pictures(
    model: ServedModel,
    parameter: str,
    pictures: Mapping[str, list[object]],
    encoder: Encoder = encode,
    *,
    keyword: str | None = None,
) -> list[Tensor]:
    """Encode pictures for the input `parameter`; errors name `keyword` if the caller knows it under another name."""
    names = [name for name, images in pictures.items() for _ in images]
    data = encode_all([image for images in pictures.values() for image in images], keyword or parameter, encoder)
    if not data:
        return []
    tensors = [bytes_tensor(model.inputs[parameter], data)]
    if f"{parameter}_adapter" in model.inputs:
        tensors.append(bytes_tensor(model.inputs[f"{parameter}_adapter"], [name.encode() for name in names]))
    return tensors


def _encode_embeds(model: ServedModel, adapter: str, values: list[object]) -> Tensor:
    spec = model.inputs.get(f"{EMBEDS}_{adapter}")
    if spec is None:
        raise invalid(EMBEDS, f"adapter {adapter} does not accept embeddings")
    if len(values) != 1:
        raise invalid(EMBEDS, f"expected one array for {adapter}, got {len(values)}")
    value = values[0]
    if getattr(value, "ndim", 0) == len(spec.dims) - 1 and spec.dims[2] == 1:
        # diffusers' guide uses [2, faces, 1, 512] for face embeddings, but diffusers accepts [2, faces, 512] as well.
        value = to_numpy(value, EMBEDS)[:, :, None]
    return numeric_tensor(spec, value, parameter=EMBEDS, label=f"{adapter}: ")


def _in_adapter_order(parameter: str, value: object, model: ServedModel, adapters: list[str]) -> object:
    """Turn a dict keyed by adapter name into a list in the order of the adapters in use; return others unchanged."""
    if not isinstance(value, Mapping):
        return value
    for name in value:
        check_adapter(parameter, name, model.adapters)
    if missing := [name for name in adapters if name not in value]:
        raise invalid(parameter, f"missing a value for {', '.join(missing)}")
    return [value[name] for name in adapters]


def _encode_scale(model: ServedModel, value: object, adapters: list[str]) -> Tensor:
    """Encode plain numbers directly, and everything else as a JSON list with one entry per adapter in use."""
    if hasattr(value, "__array__"):
        value = to_numpy(value, SCALE).tolist()
    if isinstance(value, Mapping) and value and all(name in model.adapters for name in value):
        entries = [value.get(name, 1.0) for name in adapters]
    elif is_list(value):
        entries = list(value)
        if len(entries) == len(model.adapters) != len(adapters):
            entries = [entry for name, entry in zip(model.adapters, entries, strict=True) if name in adapters]
    elif isinstance(value, Mapping):
        entries = [value] * max(len(adapters), 1)
    else:
        entries = [value]
    try:
        entries = [_plain_scale(entry) for entry in entries]
    except RecursionError:
        raise invalid(SCALE, f"{_SCALE_TYPES}; this one is nested too deeply") from None
    if all(isinstance(entry, float) for entry in entries):
        return numeric_tensor(model.inputs[SCALE], entries)
    if SCALE_CONFIG not in model.inputs:
        raise invalid(SCALE, f"{model.bundle} accepts numbers only")
    if len(entries) != len(adapters):
        raise invalid(
            SCALE, f"expected one value, or one for each of the {len(adapters)} adapters in use; got {len(entries)}"
        )
    return bytes_tensor(model.inputs[SCALE_CONFIG], [to_json(entries, SCALE)])


def _plain_scale(value: object) -> object:
    """Convert a scale to plain Python numbers, for JSON."""
    if isinstance(value, Mapping):
        return {_block_name(name): _plain_scale(entry) for name, entry in value.items()}
    if is_list(value):
        return [_plain_scale(entry) for entry in value]
    if not is_number(value):
        raise invalid(SCALE, f"{_SCALE_TYPES}; got {short_repr(value)}")
    try:
        return float(value)
    except OverflowError:
        raise invalid(SCALE, f"{short_repr(value)} is too large") from None


def _block_name(name: object) -> str:
    if not isinstance(name, str):
        raise invalid(SCALE, f"block names must be strings such as 'up'; got {short_repr(name)}")
    return name


def check_adapter(parameter: str, name: object, adapters: Sequence[str]) -> None:
    """Raise `InvalidRequest` if `name` is not one of `adapters`."""
    if not isinstance(name, str) or name not in adapters:
        close = difflib.get_close_matches(name, adapters, 1) if isinstance(name, str) else []
        hint = f"; did you mean {close[0]}?" if close else ""
        raise invalid(parameter, f"no adapter {short_repr(name)}; the bundle has {', '.join(adapters) or 'none'}{hint}")
