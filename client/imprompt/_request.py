"""Encode keyword arguments as a request, following the inputs that the model declares. Reads picture files only."""

from __future__ import annotations

import difflib
import json
import re
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from tritonclient.grpc import service_pb2

from imprompt._errors import InvalidRequest, invalid, short_repr
from imprompt._image_prompts import (
    EMBEDS,
    KEYWORDS,
    PICTURES,
    SCALE_CONFIG,
    check_adapter,
    encode_image_prompts,
    encode_pictures,
)
from imprompt._images import as_list, flatten_control_images, to_numpy
from imprompt._model import Input, ServedModel
from imprompt._parameters import NAMES, OutputType
from imprompt._parameters import PICTURES as START_PICTURES
from imprompt._tensors import Tensor, encode_input, numeric_tensor, to_json, unsigned_seeds

OUTPUT_TYPES = get_args(OutputType)
MIN_TIMEOUT_S = 1e-3
"""The smallest timeout that a server accepts; the caller's remaining time may be shorter."""
MAX_BYTES = 2**31 - 2**20
"""Maximum total size of a request's tensors: a protobuf message must be smaller than 2 GiB."""

MAX_ID_LENGTH = 128
"""Maximum length of a request id; the server cuts longer ones."""
_ID = re.compile(rf"[!-~]{{1,{MAX_ID_LENGTH}}}")
LATENT_CHANNELS = 4
"""Channels of the latents of Stable Diffusion."""
_ENCODE, _ENCODE_PROMPT = "encode_image", "encode_prompt"
_NOT_PLAIN = {
    *PICTURES,
    *START_PICTURES,
    EMBEDS,
    *("output_type", "output_format", "priority", "progress_every", "preview"),
}
"""Parameters that are not plain values, or do not change the result."""
_SECOND_PROMPTS = ("prompt_2", "negative_prompt_2")
"""If empty, the first prompt is used, as in diffusers (`prompt_2 or prompt`)."""
_CLIPS = ("num_frames", "video")
_DIFFUSERS_EQUIVALENTS = {
    "generator": "use `seed`, with the value that torch.Generator('cpu').manual_seed would get",
    "cross_attention_kwargs": "pass `ip_adapter_masks` directly",
    "callback_on_step_end": "use `stream`, which reports every step",
    "callback": "use `stream`, which reports every step",
    "return_dict": "use `output_type` to choose what to return",
    "num_videos_per_prompt": "use `num_images_per_prompt`",
    "callback_on_step_end_tensor_inputs": "use `stream`, which reports every step",
    "callback_steps": "use `stream` with `progress_every`",
    "conditioning_frames": "use `control_image`",
    "adapter_conditioning_scale": "use `controlnet_conditioning_scale`",
    "adapter_conditioning_factor": "use `control_guidance_end`",
    "masked_image_latents": "the server makes them from `image` and `mask_image`",
    "enforce_inference_steps": "increase `num_inference_steps` instead",
    "decode_chunk_size": "the server decodes frames one by one",
}
"""What replaces parameters of the diffusers pipelines that do not exist here."""
_SUGGESTIONS = {
    "cfg": ("guidance_scale",),
    "cfg_scale": ("guidance_scale",),
    "sampler": ("scheduler",),
    "sampler_name": ("scheduler",),
    "n": ("num_images_per_prompt",),
    "batch_size": ("num_images_per_prompt",),
    "size": ("height", "width"),
    "resolution": ("height", "width"),
    "image_prompt": ("ip_adapter_image",),
    "init_image": ("image",),
    "denoise": ("strength",),
    "deadline": ("timeout",),
    "response_format": ("output_type", "output_format"),
}
"""Parameter names used by diffusers and other tools, and the closest parameters here."""
_MIN_SIMILARITY = 0.8
"""Cutoff of `difflib.get_close_matches`."""
ALL_LISTED = "`help(imprompt.Client)` and docs/protocol.md list them all"


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """An encoded request that can be sent any number of times."""

    model: str
    """Name of the Triton model."""
    bundle: str
    id: str
    tensors: tuple[Tensor, ...]
    output_type: str
    clip: bool
    """Whether the result is clips rather than pictures."""
    timeout_input: Input | None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """What determines the result, as plain values: everything but pictures and arrays."""
    seeds: Mapping[int, int] = field(default_factory=dict)
    """The caller's unsigned seeds of 2**63 and above, keyed by the negative values sent for them."""

    def message(self, timeout: float | None) -> Any:
        """Build the `ModelInferRequest` for an attempt with `timeout` seconds left."""
        tensors = self.tensors
        if timeout is not None and self.timeout_input is not None:
            tensors += (numeric_tensor(self.timeout_input, max(timeout, MIN_TIMEOUT_S)),)
        message = service_pb2.ModelInferRequest(model_name=self.model, id=self.id)
        for tensor in tensors:
            message.inputs.add(name=tensor.name, datatype=tensor.dtype, shape=tensor.shape)
            message.raw_input_contents.append(tensor.data)
        return message


def build_request(
    model: ServedModel, prompt: object, parameters: Mapping[str, object], request_id: object = None
) -> Request:
    """Encode a request, except `timeout`: `Request.message` adds it, because it shrinks with every attempt.

    Raises:
        InvalidRequest: the model does not have a parameter, or a value has the wrong type.
    """
    given = {name: value for name, value in parameters.items() if value is not None}
    for name in _SECOND_PROMPTS:
        if isinstance(given.get(name), str) and not given[name]:
            del given[name]
    _refuse_unknown(model, given)
    given.pop("timeout", None)
    output_type = given.pop("output_type", "pil")
    if not isinstance(output_type, str) or output_type not in OUTPUT_TYPES:
        raise invalid("output_type", f"must be one of {', '.join(OUTPUT_TYPES)}; got {short_repr(output_type)}")
    if output_type == "latent":
        if "output_type" not in model.inputs:
            raise invalid("output_type", f"{model.bundle} cannot return latents")
        given["output_type"] = output_type  # the client makes the other two from the same response
    if prompt is None and "prompt_embeds" not in given:
        raise invalid("prompt", "is needed, or prompt_embeds in its place")
    if _is_latents(given.get("image")):
        if "image_latents" not in model.inputs:
            raise invalid("image", f"{model.bundle} does not start from latents")
        given["image_latents"] = given.pop("image")
    if "latents" in given:
        given["latents"] = _flatten_clip_latents(given["latents"])
    tensors = [] if prompt is None else [encode_input(model.inputs["prompt"], prompt)]
    tensors += encode_image_prompts(model, given)
    clip = asks_for_clip(given)
    if "control_image" in given:
        given["control_image"] = flatten_control_images(given["control_image"], clip=clip)
    tensors += [encode_input(model.inputs[name], value) for name, value in given.items() if name not in KEYWORDS]
    if sum(len(tensor.data) for tensor in tensors) > MAX_BYTES:
        largest = max(tensors, key=lambda tensor: len(tensor.data))
        size = f"{len(largest.data) / 2**20:.0f} MiB"
        raise invalid(largest.name, f"the request is too large; this parameter accounts for {size}")
    return Request(
        model=model.name,
        bundle=model.bundle,
        id=_check_id(request_id),
        tensors=tuple(tensors),
        output_type=output_type,
        clip=clip,
        timeout_input=model.inputs.get("timeout"),
        parameters=_plain_parameters({"prompt": prompt, **given}),
        seeds=unsigned_seeds(given.get("seed")),
    )


def _check_id(request_id: object) -> str:
    if request_id is None:
        return uuid.uuid4().hex
    if not isinstance(request_id, str) or not _ID.fullmatch(request_id):
        problem = f"must be 1 to {MAX_ID_LENGTH} printable ASCII characters without spaces"
        raise invalid("request_id", f"{problem}; got {short_repr(request_id)}")
    return request_id


def _plain_parameters(given: Mapping[str, object]) -> dict[str, Any]:
    plain = {}
    for name, value in given.items():
        if name in _NOT_PLAIN:
            continue
        with suppress(InvalidRequest):  # for example NaN, which the server refuses
            value = to_numpy(value, name).tolist() if hasattr(value, "__array__") else value
            plain[name] = json.loads(to_json(value, name))
    return plain


def check_request(model: ServedModel, prompt: object, parameters: Mapping[str, object]) -> None:
    """Validate what is cheap to validate: everything except pictures and parameters that depend on them.

    Raises:
        InvalidRequest: as for `build_request`.
    """
    given = {name: value for name, value in parameters.items() if value is not None}
    _refuse_unknown(model, given)
    later = {*KEYWORDS, *START_PICTURES}
    build_request(model, prompt, {name: value for name, value in given.items() if name not in later})


def _is_latents(image: object) -> bool:
    """Whether `image` is latents rather than pictures, as in diffusers: four axes, of which the second has size 4."""
    shape: tuple[int, ...] = getattr(image, "shape", ())
    return len(shape) == 4 and shape[1] == LATENT_CHANNELS and to_numpy(image, "image").dtype.kind == "f"


def _flatten_clip_latents(latents: object) -> object:
    """Join the channels and frames of clips, [clips, channels, frames, h, w], as the input has four axes."""
    array = to_numpy(latents, "latents")
    return array if array.ndim != 5 else array.reshape(len(array), -1, *array.shape[3:])


def asks_for_clip(parameters: Mapping[str, object]) -> bool:
    """Whether these parameters ask for clips rather than pictures."""
    return any(parameters.get(name) is not None for name in _CLIPS)


def build_encode_request(model: ServedModel, adapter: str, images: object) -> Request:
    """Encode a request for the embeddings of `images` by `adapter`."""
    if _ENCODE not in model.inputs:
        raise invalid("model", f"{model.bundle} does not encode images")
    check_adapter("adapter", adapter, model.adapters)
    pictures = {adapter: as_list(images, "images")}
    tensors = encode_pictures(model, "ip_adapter_image", pictures, keyword="images")
    if not tensors:
        raise invalid("images", "must contain at least one picture")
    request = build_request(model, "", {})
    tensor = encode_input(model.inputs[_ENCODE], adapter)
    return replace(request, tensors=(*request.tensors, *tensors, tensor))


def build_encode_prompt_request(model: ServedModel, prompt: object, parameters: Mapping[str, object]) -> Request:
    """Encode a request for the text embeddings of `prompt`."""
    if _ENCODE_PROMPT not in model.inputs:
        raise invalid("model", f"{model.bundle} does not encode prompts")
    request = build_request(model, prompt, parameters)
    return replace(request, tensors=(*request.tensors, encode_input(model.inputs[_ENCODE_PROMPT], True)))


def _accepted_keywords(model: ServedModel) -> list[str]:
    """List the keywords that a caller may pass: the model's inputs, except those that this module sets itself."""
    hidden = {
        "prompt",
        _ENCODE,
        _ENCODE_PROMPT,
        "image_latents",
        SCALE_CONFIG,
        *(f"{name}_adapter" for name in PICTURES),
    }
    names = [name for name in model.inputs if name not in hidden and not name.startswith(f"{EMBEDS}_")]
    if any(name.startswith(f"{EMBEDS}_") for name in model.inputs):
        names.append(EMBEDS)
    return list(dict.fromkeys([*names, "output_type", "timeout"]))


def _refuse_unknown(model: ServedModel, given: Mapping[str, object]) -> None:
    known = _accepted_keywords(model)
    for name in given:
        if name not in known:
            hint = "" if name in NAMES else _hint(name[:100], known)
            raise invalid(name, f"{model.bundle} has no such parameter; {hint}{ALL_LISTED}")


def _hint(name: str, known: list[str]) -> str:
    """Suggest what a caller may have meant by `name`."""
    if name in _DIFFUSERS_EQUIVALENTS:
        return f"{_DIFFUSERS_EQUIVALENTS[name]}; "
    known, words = ["prompt", *known], _words(name)
    near = [
        *(each for each in _SUGGESTIONS.get(name, ()) if each in known),
        *difflib.get_close_matches(name, known, 3, _MIN_SIMILARITY),
        *(each for each in known if words <= _words(each)),
    ]
    found = list(dict.fromkeys(near))[:3]
    return f"did you mean {' or '.join(found)}? " if found else ""


def _words(name: str) -> set[str]:
    return {word.removesuffix("s") for word in name.split("_")}
