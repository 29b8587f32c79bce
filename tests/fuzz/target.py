"""The fuzzing targets: the models of a repository and their inputs, read from their Triton configurations.

New parameters of the pipeline are therefore fuzzed without changes here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """An input tensor: KServe data type (`BYTES`, `FP64`, ...) and shape (-1: any size), including the batch axis."""

    name: str
    dtype: str
    dims: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A Triton model."""

    name: str
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    decoupled: bool

    def input(self, name: str) -> Input | None:
        return next((tensor for tensor in self.inputs if tensor.name == name), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A served bundle."""

    bundle: str
    pipeline: Model
    stream: Model
    internal: tuple[Model, ...]
    """Denoisers, encoders and VAE, which callers must not be able to use."""
    capabilities: Mapping[str, Any]

    @property
    def adapters(self) -> tuple[Mapping[str, Any], ...]:
        return tuple(self.capabilities["ip_adapters"])

    def smallest(self, limit: str) -> int:
        """Return the lower end of a range in the bundle's limits, such as `height`."""
        return int(self.capabilities["limits"][limit][0])

    def takes(self, *names: str) -> bool:
        """Whether the pipeline has all these inputs."""
        return all(self.pipeline.input(name) is not None for name in names)


def read_targets(repository: Path) -> tuple[Target, ...]:
    """Read the bundles of `repository`, sorted by name."""
    configs = [
        text_format.Parse(file.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
        for file in sorted(repository.glob("*/config.pbtxt"))
    ]
    pipelines = [config for config in configs if "capabilities" in config.parameters]
    streams = {config.name.removesuffix("_stream"): config for config in pipelines if _decoupled(config)}
    bundles = [config for config in pipelines if config.name in streams]
    return tuple(
        Target(
            bundle=config.name,
            pipeline=_model(config),
            stream=_model(streams[config.name]),
            internal=tuple(_model(part) for part in configs if _owner(part, bundles) is config),
            capabilities=json.loads(config.parameters["capabilities"].string_value),
        )
        for config in bundles
    )


def _owner(part: Any, bundles: list[Any]) -> Any:
    """Return the bundle of an internal model, the one with the longest matching name prefix; None for pipelines."""
    if "capabilities" in part.parameters:
        return None
    owners = [config for config in bundles if part.name.startswith(f"{config.name}_")]
    return max(owners, key=lambda config: len(config.name), default=None)


def _model(config: Any) -> Model:
    return Model(
        name=config.name,
        inputs=tuple(_input(tensor, batched=config.max_batch_size > 0) for tensor in config.input),
        outputs=tuple(tensor.name for tensor in config.output),
        decoupled=_decoupled(config),
    )


def _input(tensor: Any, *, batched: bool) -> Input:
    dtype = str(model_config_pb2.DataType.Name(tensor.data_type)).removeprefix("TYPE_")
    dims = (-1, *tensor.dims) if batched else tuple(tensor.dims)
    return Input(name=tensor.name, dtype="BYTES" if dtype == "STRING" else dtype, dims=dims)


def _decoupled(config: Any) -> bool:
    return bool(config.model_transaction_policy.decoupled)
