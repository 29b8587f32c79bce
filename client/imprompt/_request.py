"""Keyword arguments -> a request on the wire, by what the model itself says it takes. No I/O but image files."""

from __future__ import annotations

import difflib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from tritonclient.grpc import service_pb2

from imprompt._errors import invalid, shown
from imprompt._image_prompts import (
    EMBEDS,
    KEYWORDS,
    PICTURES,
    SCALE_CONFIG,
    encode_image_prompts,
    known_adapter,
    pictures_by_adapter,
)
from imprompt._images import by_net, listed
from imprompt._model import Input, ServedModel
from imprompt._parameters import NAMES, OutputType
from imprompt._tensors import PICTURES as START_PICTURES
from imprompt._tensors import Tensor, encode_input, numeric_tensor, unsigned_seeds

OUTPUT_TYPES = get_args(OutputType)
SHORTEST_TIMEOUT_S = 1e-3
"""The least that a server takes; what is left of a caller's time may be less."""
MAX_BYTES = 2**31 - 2**20
"""Of the tensors of a request: protobuf holds no message of 2 GiB."""

_ENCODE = "encode_image"
_SECOND_PROMPTS = ("prompt_2", "negative_prompt_2")
"""An empty one stands for the first prompt, as in diffusers (`prompt_2 or prompt`)."""
_CLIPS = ("num_frames", "video")
_ELSEWHERE = {
    "generator": "give `seed` what torch.Generator('cpu').manual_seed takes",
    "cross_attention_kwargs": "`ip_adapter_masks` is a parameter of its own",
    "callback_on_step_end": "`stream` reports every step",
    "callback": "`stream` reports every step",
    "return_dict": "`output_type` chooses the form of the pictures",
    "num_videos_per_prompt": "use `num_images_per_prompt`",
}
"""Parameters of the diffusers pipelines that have another form here."""
_MEANT = {
    "timesteps": ("num_inference_steps", "scheduler_config"),
    "sigmas": ("num_inference_steps", "scheduler_config"),
    "prompt_embeds": ("prompt",),
    "negative_prompt_embeds": ("negative_prompt",),
    "pooled_prompt_embeds": ("prompt_2", "prompt"),
    "negative_pooled_prompt_embeds": ("negative_prompt_2", "negative_prompt"),
    "latents": ("image",),
    "denoising_start": ("strength",),
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
"""Other names of parameters, there or elsewhere, and what comes nearest to them here."""
_SPELLED_ALIKE = 0.8
_LIST = "`help(imprompt.Client)` and docs/protocol.md list them all"


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A request, ready to be sent (again)."""

    model: str
    """Name of the Triton model."""
    bundle: str
    id: str
    tensors: tuple[Tensor, ...]
    output_type: str
    clip: bool
    """Whether it asks for clips."""
    timeout_input: Input | None
    seeds: Mapping[int, int] = field(default_factory=dict)
    """What the caller gave for seeds that are negative on the wire."""

    def message(self, timeout: float | None) -> Any:
        """The `ModelInferRequest`, with `timeout` seconds left for it."""
        tensors = self.tensors
        if timeout is not None and self.timeout_input is not None:
            tensors += (numeric_tensor(self.timeout_input, max(timeout, SHORTEST_TIMEOUT_S)),)
        message = service_pb2.ModelInferRequest(model_name=self.model, id=self.id)
        for tensor in tensors:
            message.inputs.add(name=tensor.name, datatype=tensor.dtype, shape=tensor.shape)
            message.raw_input_contents.append(tensor.data)
        return message


def build_request(model: ServedModel, prompt: object, parameters: Mapping[str, object]) -> Request:
    """Encode a request. Its `timeout` is left to `Request.message`: it shrinks while the request is tried.

    Raises:
        InvalidRequest: a parameter that the model does not have, or a value of a type that it does not take.
    """
    given = {name: value for name, value in parameters.items() if value is not None}
    for name in _SECOND_PROMPTS:
        if isinstance(given.get(name), str) and not given[name]:
            del given[name]
    _refuse_unknown(model, given)
    given.pop("timeout", None)
    output_type = given.pop("output_type", "pil")
    if not isinstance(output_type, str) or output_type not in OUTPUT_TYPES:
        raise invalid("output_type", f"one of {', '.join(OUTPUT_TYPES)}; got {shown(output_type)}")
    if output_type == "latent":
        if "output_type" not in model.inputs:
            raise invalid("output_type", f"{model.bundle} gives no latents")
        given["output_type"] = output_type  # the other two are made from the same answer
    tensors = [encode_input(model.inputs["prompt"], prompt)]
    tensors += encode_image_prompts(model, given)
    clip = asks_for_clip(given)
    if "control_image" in given:
        given["control_image"] = by_net(given["control_image"], clip=clip)
    tensors += [encode_input(model.inputs[name], value) for name, value in given.items() if name not in KEYWORDS]
    if sum(len(tensor.data) for tensor in tensors) > MAX_BYTES:
        largest = max(tensors, key=lambda tensor: len(tensor.data))
        raise invalid(largest.name, f"the request is too large; {len(largest.data) / 2**20:.0f} MiB are of this")
    return Request(
        model=model.name,
        bundle=model.bundle,
        id=uuid.uuid4().hex,
        tensors=tuple(tensors),
        output_type=output_type,
        clip=clip,
        timeout_input=model.inputs.get("timeout"),
        seeds=unsigned_seeds(given.get("seed")),
    )


def check_request(model: ServedModel, prompt: object, parameters: Mapping[str, object]) -> None:
    """Check what takes no time: all but pictures, and what depends on whose they are.

    Raises:
        InvalidRequest: as `build_request`.
    """
    given = {name: value for name, value in parameters.items() if value is not None}
    _refuse_unknown(model, given)
    later = {*KEYWORDS, *START_PICTURES}
    build_request(model, prompt, {name: value for name, value in given.items() if name not in later})


def asks_for_clip(parameters: Mapping[str, object]) -> bool:
    """Whether the answer is clips, not pictures."""
    return any(parameters.get(name) is not None for name in _CLIPS)


def build_encode_request(model: ServedModel, adapter: str, images: object) -> Request:
    """A request for the embeddings of `images` by `adapter`."""
    if _ENCODE not in model.inputs:
        raise invalid("model", f"{model.bundle} does not encode images")
    known_adapter("adapter", adapter, model.adapters)
    pictures = {adapter: listed(images, "images")}
    tensors = pictures_by_adapter(model, "ip_adapter_image", pictures, keyword="images")
    if not tensors:
        raise invalid("images", "at least one picture")
    request = build_request(model, "", {})
    tensor = encode_input(model.inputs[_ENCODE], adapter)
    return replace(request, tensors=(*request.tensors, *tensors, tensor))


def _keywords(model: ServedModel) -> list[str]:
    """What a caller may give: the model's inputs, without those that this module fills in."""
    hidden = {"prompt", _ENCODE, SCALE_CONFIG, *(f"{name}_adapter" for name in PICTURES)}
    names = [name for name in model.inputs if name not in hidden and not name.startswith(f"{EMBEDS}_")]
    if any(name.startswith(f"{EMBEDS}_") for name in model.inputs):
        names.append(EMBEDS)
    return list(dict.fromkeys([*names, "output_type", "timeout"]))


def _refuse_unknown(model: ServedModel, given: Mapping[str, object]) -> None:
    known = _keywords(model)
    for name in given:
        if name not in known:
            hint = "" if name in NAMES else _hint(name[:100], known)
            raise invalid(name, f"{model.bundle} has no such parameter; {hint}{_LIST}")


def _hint(name: str, known: list[str]) -> str:
    """What a caller may have meant by `name`."""
    if name in _ELSEWHERE:
        return f"{_ELSEWHERE[name]}; "
    known, words = ["prompt", *known], _words(name)
    near = [
        *(each for each in _MEANT.get(name, ()) if each in known),
        *difflib.get_close_matches(name, known, 3, _SPELLED_ALIKE),
        *(each for each in known if words <= _words(each)),
    ]
    found = list(dict.fromkeys(near))[:3]
    return f"did you mean {' or '.join(found)}? " if found else ""


def _words(name: str) -> set[str]:
    return {word.removesuffix("s") for word in name.split("_")}
