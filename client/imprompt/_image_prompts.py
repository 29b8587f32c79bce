"""Image prompts of a request: whose they are, and how strong."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence

from imprompt._errors import invalid, shown
from imprompt._images import Encoder, encode, encode_all, encode_mask, listed, listed_masks, to_numpy
from imprompt._model import ServedModel
from imprompt._tensors import Tensor, bytes_tensor, encode_input, is_list, is_number, numeric_tensor, to_json

PICTURES = ("ip_adapter_image", "negative_ip_adapter_image", "ip_adapter_masks")
"""On the wire each is a flat list, with the adapter of each in the input `<name>_adapter`."""
VALUES = ("ip_adapter_start", "ip_adapter_end", "ip_adapter_weight_type")
EMBEDS = "ip_adapter_image_embeds"
"""On the wire an input for each adapter, `ip_adapter_image_embeds_<adapter>`."""
SCALE = "ip_adapter_scale"
SCALE_CONFIG = "ip_adapter_scale_config"
"""On the wire in place of `ip_adapter_scale`, when that is more than plain numbers."""

KEYWORDS = (*PICTURES, *VALUES, EMBEDS, SCALE)
"""The keyword arguments that are encoded here."""


def encode_image_prompts(model: ServedModel, given: Mapping[str, object]) -> list[Tensor]:
    """The tensors of those of `KEYWORDS` that are given; names are checked, all is in the order of the bundle."""
    tensors: list[Tensor] = []
    used: set[str] = set()
    for name in PICTURES:
        if name in given:
            is_mask = name == "ip_adapter_masks"
            pictures = _by_adapter(name, given[name], model, listed_masks if is_mask else listed)
            tensors += pictures_by_adapter(model, name, pictures, encode_mask if is_mask else encode)
            if name == "ip_adapter_image":
                used |= pictures.keys()
    if EMBEDS in given:
        embeds = _by_adapter(EMBEDS, given[EMBEDS], model, lambda array, _: [array])
        tensors += [_embeds(model, adapter, values) for adapter, values in embeds.items()]
        used |= embeds.keys()
    adapters = [name for name in model.adapters if name in used or not used]
    if SCALE in given:
        tensors.append(_scale(model, given[SCALE], adapters))
    for name in VALUES:
        if name in given:
            tensors.append(encode_input(model.inputs[name], _in_order(name, given[name], model, adapters)))
    return tensors


def _by_adapter(
    parameter: str, value: object, model: ServedModel, split: Callable[[object, str], list[object]]
) -> dict[str, list[object]]:
    """The pictures (masks, embeddings) of each adapter that has some, in the order of the bundle."""
    adapters = model.adapters
    if not adapters:
        raise invalid(parameter, f"{model.bundle} has no IP-Adapter")
    if isinstance(value, Mapping):
        for name in value:
            known_adapter(parameter, name, adapters)
        entries = {name: value.get(name) for name in adapters}
    else:
        listing = list(value) if is_list(value) else [value]
        if len(adapters) == 1:
            flat = [item for entry in listing if entry is not None for item in split(entry, parameter)]
            return {adapters[0]: flat} if flat else {}
        if len(listing) != len(adapters):
            raise invalid(
                parameter,
                f"an entry for each of {', '.join(adapters)}, or a dict by adapter name; got {len(listing)}",
            )
        entries = dict(zip(adapters, listing, strict=True))
    parts = {name: split(entry, parameter) for name, entry in entries.items() if entry is not None}
    return {name: part for name, part in parts.items() if part}


def pictures_by_adapter(
    model: ServedModel,
    parameter: str,
    pictures: Mapping[str, list[object]],
    encoder: Encoder = encode,
    *,
    keyword: str | None = None,
) -> list[Tensor]:
    """The tensors of the input `parameter`; errors name the `keyword` that a caller knows it by, if that is another."""
    names = [name for name, images in pictures.items() for _ in images]
    data = encode_all([image for images in pictures.values() for image in images], keyword or parameter, encoder)
    if not data:
        return []
    tensors = [bytes_tensor(model.inputs[parameter], data)]
    if f"{parameter}_adapter" in model.inputs:
        tensors.append(bytes_tensor(model.inputs[f"{parameter}_adapter"], [name.encode() for name in names]))
    return tensors


def _embeds(model: ServedModel, adapter: str, values: list[object]) -> Tensor:
    wanted = model.inputs.get(f"{EMBEDS}_{adapter}")
    if wanted is None:
        raise invalid(EMBEDS, f"{adapter} takes none")
    if len(values) != 1:
        raise invalid(EMBEDS, f"one array for {adapter}, got {len(values)}")
    value = values[0]
    if getattr(value, "ndim", 0) == len(wanted.dims) - 1 and wanted.dims[2] == 1:
        # Face embeddings are [2, faces, 1, 512] in diffusers' guide, but it takes [2, faces, 512] as well.
        value = to_numpy(value, EMBEDS)[:, :, None]
    return numeric_tensor(wanted, value, parameter=EMBEDS, label=f"{adapter}: ")


def _in_order(parameter: str, value: object, model: ServedModel, adapters: list[str]) -> object:
    """A dict by adapter name as a list, in the order of the adapters in use; anything else as it is."""
    if not isinstance(value, Mapping):
        return value
    for name in value:
        known_adapter(parameter, name, model.adapters)
    if missing := [name for name in adapters if name not in value]:
        raise invalid(parameter, f"none given for {', '.join(missing)}")
    return [value[name] for name in adapters]


def _scale(model: ServedModel, value: object, adapters: list[str]) -> Tensor:
    """Plain numbers as they are; all else as a JSON list with an entry for each adapter in use."""
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
        raise invalid(SCALE, "numbers, dicts by block and lists of them; these are nested too deep") from None
    if all(isinstance(entry, float) for entry in entries):
        return numeric_tensor(model.inputs[SCALE], entries)
    if SCALE_CONFIG not in model.inputs:
        raise invalid(SCALE, f"{model.bundle} takes numbers only")
    if len(entries) != len(adapters):
        raise invalid(SCALE, f"one, or one for each of the {len(adapters)} adapters in use; got {len(entries)}")
    return bytes_tensor(model.inputs[SCALE_CONFIG], [to_json(entries, SCALE)])


def _plain_scale(value: object) -> object:
    """A scale with Python's own numbers, for JSON."""
    if isinstance(value, Mapping):
        return {_block(name): _plain_scale(entry) for name, entry in value.items()}
    if is_list(value):
        return [_plain_scale(entry) for entry in value]
    if not is_number(value):
        raise invalid(SCALE, f"numbers, dicts by block and lists of them; got {shown(value)}")
    try:
        return float(value)
    except OverflowError:
        raise invalid(SCALE, f"{shown(value)} is too large") from None


def _block(name: object) -> str:
    if not isinstance(name, str):
        raise invalid(SCALE, f"blocks have names, such as 'up'; got {shown(name)}")
    return name


def known_adapter(parameter: str, name: object, adapters: Sequence[str]) -> None:
    """Refuse a name that is none of `adapters`."""
    if not isinstance(name, str) or name not in adapters:
        close = difflib.get_close_matches(name, adapters, 1) if isinstance(name, str) else []
        hint = f"; did you mean {close[0]}?" if close else ""
        raise invalid(parameter, f"no adapter {shown(name)}; the bundle has {', '.join(adapters) or 'none'}{hint}")
