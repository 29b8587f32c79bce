"""Keyword arguments -> a request on the wire, by what the model itself says it takes. No I/O but image files."""

from __future__ import annotations

import difflib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tritonclient.grpc import service_pb2

from imprompt._errors import invalid
from imprompt._image_prompts import EMBEDS, KEYWORDS, PICTURES, SCALE_CONFIG, encode_image_prompts, known_adapter
from imprompt._images import by_net
from imprompt._model import Input, ServedModel
from imprompt._tensors import Tensor, encode_input, numeric_tensor

OUTPUT_TYPES = ("pil", "np", "latent")

_ENCODE = "encode_image"
_SECOND_PROMPTS = ("prompt_2", "negative_prompt_2")
"""An empty one stands for the first prompt, as in diffusers (`prompt_2 or prompt`)."""
_CLIPS = ("num_frames", "video")
_ELSEWHERE = {
    "generator": "give `seed` what torch.Generator('cpu').manual_seed takes",
    "cross_attention_kwargs": "`ip_adapter_masks` is a parameter of its own",
    "callback_on_step_end": "`stream` reports every step",
    "num_videos_per_prompt": "use `num_images_per_prompt`",
}
"""Parameters of the diffusers pipelines that have another form here."""


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

    def message(self, timeout: float | None) -> Any:
        """The `ModelInferRequest`, with `timeout` seconds left for it."""
        tensors = self.tensors
        if timeout is not None and self.timeout_input is not None:
            tensors += (numeric_tensor(self.timeout_input, timeout),)
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
        if given.get(name) == "":
            del given[name]
    _refuse_unknown(model, given)
    given.pop("timeout", None)
    output_type = given.pop("output_type", "pil")
    if output_type not in OUTPUT_TYPES:
        raise invalid("output_type", f"one of {', '.join(OUTPUT_TYPES)}; got {output_type!r}")
    if output_type == "latent":
        if "output_type" not in model.inputs:
            raise invalid("output_type", f"{model.bundle} gives no latents")
        given["output_type"] = output_type  # the other two are made from the same answer
    tensors = [encode_input(model.inputs["prompt"], prompt)]
    tensors += encode_image_prompts(model, given)
    clip = not given.keys().isdisjoint(_CLIPS)
    if "control_image" in given:
        given["control_image"] = by_net(given["control_image"], clip=clip)
    tensors += [encode_input(model.inputs[name], value) for name, value in given.items() if name not in KEYWORDS]
    return Request(
        model=model.name,
        bundle=model.bundle,
        id=uuid.uuid4().hex,
        tensors=tuple(tensors),
        output_type=str(output_type),
        clip=clip,
        timeout_input=model.inputs.get("timeout"),
    )


def build_encode_request(model: ServedModel, adapter: str, images: object) -> Request:
    """A request for the embeddings of `images` by `adapter`."""
    if _ENCODE not in model.inputs:
        raise invalid("model", f"{model.bundle} does not encode images")
    known_adapter("adapter", adapter, model.adapters)
    request = build_request(model, "", {"ip_adapter_image": {adapter: images}})
    tensor = encode_input(model.inputs[_ENCODE], adapter)
    return replace(request, tensors=(*request.tensors, tensor))


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
        if name in known:
            continue
        close = difflib.get_close_matches(name, known)
        hint = _ELSEWHERE.get(name) or (f"did you mean {' or '.join(close)}?" if close else "see `describe`")
        raise invalid(name, f"{model.bundle} has no such parameter; {hint}")
