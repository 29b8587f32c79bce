"""The inputs and capabilities of a served model, as the server describes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from tritonclient.grpc import model_config_pb2

from imprompt._errors import InvalidRequest, invalid, short_repr

_STREAM_SUFFIX = "_stream"


class AdapterCapabilities(TypedDict):
    """An IP-Adapter of a bundle."""

    name: str
    kind: str
    """`plain`, `plus`, `full_face`, `faceid`, `faceid_plus` or `faceid_plusv2`."""
    image_tokens: int
    """Image tokens per picture."""
    image_embeds: list[int]
    """Shape of one picture's embedding: the shape of `ip_adapter_image_embeds` after its first two axes."""
    takes_images: bool
    """Whether it accepts pictures, and not only embeddings."""
    finds_faces: bool
    """FaceID only: whether it accepts a photo of a person in place of a face embedding."""


class Capabilities(TypedDict, total=False):
    """What a served bundle can do. A server may send more keys than these."""

    name: str
    family: str
    """`sd15` or `sdxl`."""
    backend: str
    precision: str
    ip_adapters: list[AdapterCapabilities]
    controlnets: list[str]
    loras: list[str]
    """LoRAs that requests choose by `lora`."""
    schedulers: list[str]
    """Class names of diffusers schedulers."""
    defaults: dict[str, Any]
    limits: dict[str, Any]
    """`[min, max]` of `height` and `width` in pixels; maximum `rows` of a batch and `image_tokens` of a request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """An input tensor: KServe data type (`BYTES`, `FP64`, ...) and shape (-1: any size)."""

    name: str
    dtype: str
    dims: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """A bundle's pipeline as a Triton model. Its `name` is the bundle's, plus a suffix for the streaming model."""

    name: str
    bundle: str
    inputs: Mapping[str, Input]
    capabilities: Capabilities

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the bundle's IP-Adapters, in the bundle's order."""
        return tuple(adapter["name"] for adapter in self.capabilities.get("ip_adapters", ()))


def model_name(bundle: object, *, stream: bool) -> str:
    """Return the name of the Triton model for `bundle`: the streaming one if `stream`.

    Raises:
        InvalidRequest: `bundle` is not a printable string.
    """
    if not isinstance(bundle, str) or not bundle.isprintable():
        raise invalid("model", f"must be the name of a bundle, got {short_repr(bundle)}")
    return bundle + _STREAM_SUFFIX if stream else bundle


def is_bundle(config: Any) -> bool:
    """Whether a `ModelConfig` belongs to a bundle, rather than to one of its parts or its streaming model."""
    return _is_pipeline(config, stream=False)


def read_model(config: Any, *, stream: bool) -> ServedModel:
    """Parse a `ModelConfig` protobuf.

    Raises:
        InvalidRequest: the model is not the pipeline of a bundle.
    """
    if not _is_pipeline(config, stream=stream):
        raise invalid("model", f"{config.name} is not a bundle")
    return ServedModel(
        name=config.name,
        bundle=config.name.removesuffix(_STREAM_SUFFIX) if stream else config.name,
        inputs={
            tensor.name: Input(name=tensor.name, dtype=_dtype(tensor.data_type), dims=tuple(tensor.dims))
            for tensor in config.input
        },
        capabilities=json.loads(config.parameters["capabilities"].string_value),
    )


def unknown_bundle(name: str, served: Sequence[str]) -> InvalidRequest:
    """Build the error for a bundle that is not served."""
    return invalid("model", f"unknown bundle {short_repr(name)}; served: {', '.join(served) or 'none'}")


def _is_pipeline(config: Any, *, stream: bool) -> bool:
    return "capabilities" in config.parameters and config.model_transaction_policy.decoupled == stream


def _dtype(data_type: int) -> str:
    name: str = model_config_pb2.DataType.Name(data_type).removeprefix("TYPE_")
    return "BYTES" if name == "STRING" else name
