"""What the server says of a model: its inputs, and its capabilities."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from tritonclient.grpc import model_config_pb2

from imprompt._errors import InvalidRequest, invalid, shown

_STREAM_SUFFIX = "_stream"


class AdapterCapabilities(TypedDict):
    """An IP-Adapter of a bundle."""

    name: str
    kind: str
    """`plain`, `plus`, `full_face`, `faceid`, `faceid_plus` or `faceid_plusv2`."""
    image_tokens: int
    """Tokens that one picture becomes."""
    image_embeds: list[int]
    """Shape of one picture's embedding: that of `ip_adapter_image_embeds` after its first two axes."""
    takes_images: bool
    finds_faces: bool
    """FaceID: whether a picture of a person may stand in for a face embedding."""


class Capabilities(TypedDict, total=False):
    """What a served bundle can do, as the server describes it; it may hold more than these keys."""

    name: str
    family: str
    """`sd15` or `sdxl`."""
    backend: str
    precision: str
    ip_adapters: list[AdapterCapabilities]
    controlnets: list[str]
    schedulers: list[str]
    """diffusers class names."""
    defaults: dict[str, Any]
    limits: dict[str, Any]
    """Smallest and largest `height` and `width` in pixels, most `rows` of a batch and `image_tokens` of a request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """An input tensor: KServe data type (`BYTES`, `FP64`, ...) and dimensions (-1: any)."""

    name: str
    dtype: str
    dims: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """A pipeline model, as Triton serves it: `name` is its own, and longer than `bundle` for the streaming twin."""

    name: str
    bundle: str
    inputs: Mapping[str, Input]
    capabilities: Capabilities

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the bundle's IP-Adapters, in its order."""
        return tuple(adapter["name"] for adapter in self.capabilities.get("ip_adapters", ()))


def model_name(bundle: object, *, stream: bool) -> str:
    """Name of the Triton model that serves `bundle`: with one answer, or with progress.

    Raises:
        InvalidRequest: `bundle` is no name.
    """
    if not isinstance(bundle, str) or not bundle.isprintable():
        raise invalid("model", f"the name of a bundle, got {shown(bundle)}")
    return bundle + _STREAM_SUFFIX if stream else bundle


def is_bundle(config: Any) -> bool:
    """Whether a `ModelConfig` is that of a bundle, and not of one of its parts or its streaming twin."""
    return _is_pipeline(config, stream=False)


def read_model(config: Any, *, stream: bool) -> ServedModel:
    """A `ModelConfig` protobuf, read.

    Raises:
        InvalidRequest: not the pipeline of a bundle.
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


def no_bundle(name: str, served: Sequence[str]) -> InvalidRequest:
    """The error for a bundle that is not there."""
    return invalid("model", f"no bundle {shown(name)}; served: {', '.join(served) or 'none'}")


def _is_pipeline(config: Any, *, stream: bool) -> bool:
    return "capabilities" in config.parameters and config.model_transaction_policy.decoupled == stream


def _dtype(data_type: int) -> str:
    name: str = model_config_pb2.DataType.Name(data_type).removeprefix("TYPE_")
    return "BYTES" if name == "STRING" else name
