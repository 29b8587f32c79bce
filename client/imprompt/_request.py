"""Keyword arguments -> a request on the wire, by what the model itself says it takes. No I/O but image files."""

from __future__ import annotations

import difflib
import json
import math
import numbers
import os
import reprlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tritonclient.grpc import service_pb2
from tritonclient.utils import serialize_byte_tensor, triton_to_np_dtype

from imprompt._errors import invalid
from imprompt._images import encode, encode_mask, listed, listed_masks, to_numpy
from imprompt._model import Input, ServedModel

OUTPUT_TYPES = ("pil", "np", "latent")

_PICTURES = ("image", "mask_image", "control_image", "video")
_BY_ADAPTER = ("ip_adapter_image", "negative_ip_adapter_image", "ip_adapter_masks")
_VALUE_BY_ADAPTER = ("ip_adapter_start", "ip_adapter_end", "ip_adapter_weight_type")
_EMBEDS = "ip_adapter_image_embeds"
_SCALE = "ip_adapter_scale"
_SCALE_CONFIG = "ip_adapter_scale_config"
_ENCODE = "encode_image"
_IMAGE_PROMPTS = (*_BY_ADAPTER, *_VALUE_BY_ADAPTER, _EMBEDS, _SCALE)
_ELSEWHERE = {
    "generator": "give `seed` what torch.Generator('cpu').manual_seed takes",
    "cross_attention_kwargs": "`ip_adapter_masks` is a parameter of its own",
    "callback_on_step_end": "`stream` reports every step",
    "num_videos_per_prompt": "use `num_images_per_prompt`",
}
"""Parameters of the diffusers pipelines that have another form here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """An input on the wire."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A request, ready to be sent (again)."""

    model: str
    """Name of the Triton model."""
    bundle: str
    id: str
    tensors: tuple[Tensor, ...]
    output_type: str
    timeout: float | None
    timeout_input: Input | None

    def message(self, timeout: float | None) -> Any:
        """The `ModelInferRequest`, with `timeout` seconds left for it."""
        tensors = self.tensors
        if timeout is not None and self.timeout_input is not None:
            tensors += (_numeric(self.timeout_input, timeout),)
        message = service_pb2.ModelInferRequest(model_name=self.model, id=self.id)
        for tensor in tensors:
            message.inputs.add(name=tensor.name, datatype=tensor.dtype, shape=tensor.shape)
            message.raw_input_contents.append(tensor.data)
        return message


def build_request(
    model: ServedModel, prompt: object, parameters: Mapping[str, object], *, timeout: float | None = None
) -> Request:
    """Encode a request; `timeout` is used if the parameters have none.

    Raises:
        InvalidRequest: a parameter that the model does not have, or a value of a type that it does not take.
    """
    given = {name: value for name, value in parameters.items() if value is not None}
    _refuse_unknown(model, given)
    timeout = _timeout(given.pop("timeout", timeout))
    output_type = given.pop("output_type", "pil")
    if output_type not in OUTPUT_TYPES:
        raise invalid("output_type", f"one of {', '.join(OUTPUT_TYPES)}; got {output_type!r}")
    if output_type == "latent":
        if "output_type" not in model.inputs:
            raise invalid("output_type", f"{model.bundle} gives no latents")
        given["output_type"] = output_type  # the other two are made from the same answer
    tensors = [_encode_input(model.inputs["prompt"], prompt)]
    tensors += _image_prompts(model, given)
    tensors += [_encode_input(model.inputs[name], value) for name, value in given.items() if name not in _IMAGE_PROMPTS]
    return Request(
        model=model.name,
        bundle=model.bundle,
        id=uuid.uuid4().hex,
        tensors=tuple(tensors),
        output_type=str(output_type),
        timeout=timeout,
        timeout_input=model.inputs.get("timeout"),
    )


def build_encode_request(model: ServedModel, adapter: str, images: object, *, timeout: float | None = None) -> Request:
    """A request for the embeddings of `images` by `adapter`."""
    if _ENCODE not in model.inputs:
        raise invalid("model", f"{model.bundle} does not encode images")
    _known_adapter("adapter", adapter, model.adapters)
    request = build_request(model, "", {"ip_adapter_image": {adapter: images}}, timeout=timeout)
    tensor = _encode_input(model.inputs[_ENCODE], adapter)
    return replace(request, tensors=(*request.tensors, tensor))


def _keywords(model: ServedModel) -> list[str]:
    """What a caller may give: the model's inputs, without those that this module fills in."""
    hidden = {"prompt", _ENCODE, _SCALE_CONFIG, *(f"{name}_adapter" for name in _BY_ADAPTER)}
    names = [name for name in model.inputs if name not in hidden and not name.startswith(f"{_EMBEDS}_")]
    if any(name.startswith(f"{_EMBEDS}_") for name in model.inputs):
        names.append(_EMBEDS)
    return list(dict.fromkeys([*names, "output_type", "timeout"]))


def _refuse_unknown(model: ServedModel, given: Mapping[str, object]) -> None:
    known = _keywords(model)
    for name in given:
        if name in known:
            continue
        close = difflib.get_close_matches(name, known)
        hint = _ELSEWHERE.get(name) or (f"did you mean {' or '.join(close)}?" if close else "see `describe`")
        raise invalid(name, f"{model.bundle} has no such parameter; {hint}")


def _timeout(value: object) -> float | None:
    if value is None:
        return None
    if not _is_number(value) or not float(value) > 0:  # type: ignore[arg-type]
        raise invalid("timeout", f"seconds, more than 0; got {value!r}")
    return float(value) if math.isfinite(value) else None  # type: ignore[arg-type]


# Image prompts: pictures, embeddings and scales of the adapters.


def _image_prompts(model: ServedModel, given: Mapping[str, object]) -> list[Tensor]:
    tensors: list[Tensor] = []
    used: set[str] = set()
    for name in _BY_ADAPTER:
        if name in given:
            is_mask = name == "ip_adapter_masks"
            pictures = _by_adapter(name, given[name], model, listed_masks if is_mask else listed)
            tensors += _pictures_by_adapter(model, name, pictures, encode_mask if is_mask else encode)
            if name == "ip_adapter_image":
                used |= pictures.keys()
    if _EMBEDS in given:
        embeds = _by_adapter(_EMBEDS, given[_EMBEDS], model, _listed_embeds)
        tensors += [_embeds(model, adapter, values) for adapter, values in embeds.items()]
        used |= embeds.keys()
    adapters = [name for name in model.adapters if name in used or not used]
    if _SCALE in given:
        tensors.append(_scale(model, given[_SCALE], adapters))
    for name in _VALUE_BY_ADAPTER:
        if name in given:
            tensors.append(_encode_input(model.inputs[name], _in_order(name, given[name], model, adapters)))
    return tensors


def _by_adapter(
    parameter: str, value: object, model: ServedModel, split: Callable[[object], list[object]]
) -> dict[str, list[object]]:
    """The pictures (masks, embeddings) of each adapter that has some, in the order of the bundle."""
    adapters = model.adapters
    if not adapters:
        raise invalid(parameter, f"{model.bundle} has no IP-Adapter")
    if isinstance(value, Mapping):
        for name in value:
            _known_adapter(parameter, name, adapters)
        entries = {name: value.get(name) for name in adapters}
    else:
        listing = list(value) if _is_list(value) else [value]  # type: ignore[call-overload]
        if len(adapters) == 1:
            flat = [item for entry in listing if entry is not None for item in split(entry)]
            return {adapters[0]: flat} if flat else {}
        if len(listing) != len(adapters):
            raise invalid(
                parameter,
                f"an entry for each of {', '.join(adapters)}, or a dict by adapter name; got {len(listing)} entries",
            )
        entries = dict(zip(adapters, listing, strict=True))
    parts = {name: split(entry) for name, entry in entries.items() if entry is not None}
    return {name: part for name, part in parts.items() if part}


def _pictures_by_adapter(
    model: ServedModel,
    parameter: str,
    pictures: Mapping[str, list[object]],
    encoder: Callable[[object, str], bytes],
) -> list[Tensor]:
    names = [name for name, images in pictures.items() for _ in images]
    data = [encoder(image, parameter) for images in pictures.values() for image in images]
    if not data:
        return []
    tensors = [_bytes_tensor(model.inputs[parameter], data)]
    if f"{parameter}_adapter" in model.inputs:
        tensors.append(_bytes_tensor(model.inputs[f"{parameter}_adapter"], [name.encode() for name in names]))
    return tensors


def _listed_embeds(embeds: object) -> list[object]:
    """One adapter's embeddings; in a list they are an entry per adapter, so this one is whole."""
    return [embeds]


def _embeds(model: ServedModel, adapter: str, values: list[object]) -> Tensor:
    wanted = model.inputs.get(f"{_EMBEDS}_{adapter}")
    if wanted is None:
        raise invalid(_EMBEDS, f"{adapter} takes none")
    if len(values) != 1:
        raise invalid(_EMBEDS, f"one array for {adapter}, got {len(values)}")
    return _numeric(wanted, values[0], parameter=_EMBEDS, label=f"{adapter}: ")


def _in_order(parameter: str, value: object, model: ServedModel, adapters: list[str]) -> object:
    """A dict by adapter name as a list, in the order of the adapters in use; anything else as it is."""
    if not isinstance(value, Mapping):
        return value
    for name in (*value, *adapters):
        _known_adapter(parameter, name, model.adapters)
    if missing := [name for name in adapters if name not in value]:
        raise invalid(parameter, f"none given for {', '.join(missing)}")
    return [value[name] for name in adapters]


def _scale(model: ServedModel, value: object, adapters: list[str]) -> Tensor:
    """Plain numbers as they are; all else as a JSON list with an entry for each adapter in use."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping) and value and all(name in model.adapters for name in value):
        entries = [value.get(name, 1.0) for name in adapters]
    elif _is_list(value):
        entries = list(value)  # type: ignore[call-overload]
        if len(entries) == len(model.adapters) != len(adapters):
            entries = [entry for name, entry in zip(model.adapters, entries, strict=True) if name in adapters]
    elif isinstance(value, Mapping):
        entries = [value] * max(len(adapters), 1)
    else:
        entries = [value]
    entries = [_plain_scale(entry) for entry in entries]
    if all(isinstance(entry, float) for entry in entries):
        return _numeric(model.inputs[_SCALE], entries)
    if _SCALE_CONFIG not in model.inputs:
        raise invalid(_SCALE, f"{model.bundle} takes numbers only")
    if len(entries) != len(adapters):
        raise invalid(_SCALE, f"one, or one for each of the {len(adapters)} adapters in use; got {len(entries)}")
    return _bytes_tensor(model.inputs[_SCALE_CONFIG], [_json(entries, _SCALE)])


def _plain_scale(value: object) -> object:
    """A scale with Python's own numbers, for JSON."""
    if isinstance(value, Mapping):
        return {_block(name): _plain_scale(entry) for name, entry in value.items()}
    if _is_list(value):
        return [_plain_scale(entry) for entry in value]  # type: ignore[attr-defined]
    if _is_number(value):
        return float(value)  # type: ignore[arg-type]
    raise invalid(_SCALE, f"numbers, dicts by block and lists of them; got {value!r}")


def _block(name: object) -> str:
    if not isinstance(name, str):
        raise invalid(_SCALE, f"blocks have names, such as 'up'; got {name!r}")
    return name


def _known_adapter(parameter: str, name: object, adapters: Sequence[str]) -> None:
    if name not in adapters:
        close = difflib.get_close_matches(str(name), adapters, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise invalid(parameter, f"no adapter {name!r}; the bundle has {', '.join(adapters) or 'none'}{hint}")


# Any other input: by its data type.


def _encode_input(wanted: Input, value: object) -> Tensor:
    if wanted.dtype == "BYTES":
        return _texts_or_pictures(wanted, value)
    if wanted.name == "seed":
        value = _signed(value)
    return _numeric(wanted, value)


def _texts_or_pictures(wanted: Input, value: object) -> Tensor:
    if wanted.name in _PICTURES:
        encoder = encode_mask if wanted.name == "mask_image" else encode
        return _bytes_tensor(wanted, [encoder(image, wanted.name) for image in listed(value)])
    if isinstance(value, Mapping):
        return _bytes_tensor(wanted, [_json(dict(value), wanted.name)])
    return _bytes_tensor(wanted, [_text(item, wanted) for item in (value if _is_list(value) else [value])])  # type: ignore[attr-defined]


def _text(value: object, wanted: Input) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, bytes):
        return value
    if isinstance(value, Image.Image | os.PathLike | np.ndarray):
        return encode(value, wanted.name)
    many = " (or a list)" if wanted.dims == (-1,) else ""
    raise invalid(wanted.name, f"takes text{many}, got {type(value).__name__}")


def _bytes_tensor(wanted: Input, values: list[bytes]) -> Tensor:
    shape = _shape(wanted, (len(values),))
    data = serialize_byte_tensor(np.array(values, dtype=np.object_)).item() if values else b""
    return Tensor(name=wanted.name, dtype="BYTES", shape=shape, data=data)


def _numeric(wanted: Input, value: object, *, parameter: str | None = None, label: str = "") -> Tensor:
    """A number, a list or an array, in the data type that the model has for it.

    Raises:
        InvalidRequest: for a value of another kind (no text for a number, no fraction for an integer), or shape.
    """
    parameter = parameter or wanted.name
    target: np.dtype[Any] = np.dtype(triton_to_np_dtype(wanted.dtype))
    kinds, what = _KINDS[target.kind]
    try:
        array = to_numpy(value)
    except (TypeError, ValueError):
        raise invalid(parameter, f"{label}takes {what}, got {reprlib.repr(value)}") from None
    if array.dtype.kind not in kinds and array.size:
        shown = f"an array of {array.dtype}" if array.ndim > 1 else reprlib.repr(value)
        raise invalid(parameter, f"{label}takes {what}, got {shown}")
    if target.kind in "iu" and array.size:
        limits = np.iinfo(target)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise invalid(parameter, f"{label}takes {limits.min} to {limits.max}, got {reprlib.repr(value)}")
    shape = _shape(wanted, array.shape or (1,), parameter=parameter, label=label)
    data = np.ascontiguousarray(array, dtype=target).tobytes()
    return Tensor(name=wanted.name, dtype=wanted.dtype, shape=shape, data=data)


_KINDS = {
    "f": ("fiu", "numbers"),
    "i": ("iu", "whole numbers"),
    "u": ("iu", "whole numbers"),
    "b": ("b", "true or false"),
}
"""By kind of the wanted data type: kinds of numpy arrays that it takes, and their name in messages."""


def _shape(wanted: Input, shape: tuple[int, ...], *, parameter: str | None = None, label: str = "") -> tuple[int, ...]:
    parameter = parameter or wanted.name
    if wanted.dims == (1,) and shape != (1,):
        raise invalid(parameter, f"{label}takes one value, got {math.prod(shape)}")
    if len(shape) != len(wanted.dims) or any(d not in (-1, s) for d, s in zip(wanted.dims, shape, strict=True)):
        dims = ", ".join("any" if size < 0 else str(size) for size in wanted.dims)
        raise invalid(parameter, f"{label}takes the shape [{dims}], got {list(shape)}")
    return shape


def _signed(seed: object) -> object:
    """`manual_seed` takes 64 bits, signed or not; the wire has them signed."""
    if _is_list(seed):
        return [_signed(entry) for entry in seed]  # type: ignore[attr-defined]
    if not isinstance(seed, numbers.Integral) or isinstance(seed, bool):
        return seed
    if not -(2**63) <= int(seed) < 2**64:
        raise invalid("seed", f"takes -2**63 to 2**64 - 1, got {seed}")
    return int(seed) - 2**64 if int(seed) >= 2**63 else int(seed)


def _json(value: object, parameter: str) -> bytes:
    try:
        return json.dumps(value, allow_nan=False, default=_json_default).encode()
    except (TypeError, ValueError) as error:
        raise invalid(parameter, f"must be plain JSON values: {error}") from None


def _json_default(value: object) -> object:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is none")


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)
