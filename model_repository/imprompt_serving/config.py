"""Build `config.pbtxt` for each model of a repository, as protobuf `ModelConfig`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from imprompt_serving import wire
from imprompt_serving.backends import get_backend
from imprompt_serving.specs import Bundle, CallRows
from imprompt_serving.wire import Tensor


def to_pbtxt(config: pb.ModelConfig) -> str:
    """Format a configuration as the text of `config.pbtxt`."""
    return str(text_format.MessageToString(config))


def pipeline(bundle: Bundle, *, stream: bool, capabilities: str) -> pb.ModelConfig:
    """Configure the pipeline model: unary, or decoupled with `stream`. A model parameter carries the capabilities."""
    config = _python_model(bundle.model("stream") if stream else bundle.name, decoupled=stream)
    _add(config, wire.request_tensors(bundle, stream=stream), wire.response_tensors(bundle, stream=stream))
    for tensor in config.input:
        tensor.optional = True
    config.parameters["capabilities"].string_value = capabilities
    return config


def denoiser(bundle: Bundle, name: str) -> pb.ModelConfig:
    """Configure a denoiser: it takes a job as JSON with its tensors, and answers with progress and latents."""
    config = _python_model(name, decoupled=True)
    _add(config, wire.job_tensors(bundle), wire.JOB_RESPONSE)
    for tensor in config.input:
        tensor.optional = True
    return config


def face_encoder(bundle: Bundle) -> pb.ModelConfig:
    """Configure the face encoder: encoded picture in, face out. The response cache answers repeated pictures."""
    config = _python_model(bundle.model("face_encoder"), decoupled=False)
    _add(config, wire.FACE_INPUT, wire.FACE_OUTPUT)
    config.response_cache.enable = True
    return config


def engine(
    name: str,
    inputs: Iterable[Tensor],
    outputs: Iterable[Tensor],
    *,
    backend: str,
    host: str,
    threads: int = 0,
    devices: Sequence[int] = (),
    max_batch_size: int,
    usual_dims: Mapping[str, Sequence[int]],
    cache: bool = False,
) -> pb.ModelConfig:
    """Configure an engine with dynamic batching, hosted by a Python model or a Triton backend (`host = "native"`).

    Args:
        devices: GPUs; the engine gets one instance on each.
        usual_dims: dimensions of one row of each input, for the warm-up of engines on GPUs.
    """
    if host == "native":
        config = pb.ModelConfig(name=name, backend=backend, platform=get_backend(backend).triton_platform)
        if devices:
            _warm_up(config, inputs, usual_dims, CallRows(max_batch_size, bucketed=True))
    else:
        config = _python_model(name, decoupled=False)
        config.parameters["engine_backend"].string_value = backend
        config.parameters["engine_threads"].string_value = str(threads)
        config.parameters["engine_usual_dims"].string_value = json.dumps(dict(usual_dims))
        inputs = (*inputs, wire.SECRET)
    if devices:
        del config.instance_group[:]
        config.instance_group.add(kind=pb.ModelInstanceGroup.KIND_GPU, count=1, gpus=devices)
    config.max_batch_size = max_batch_size
    config.dynamic_batching.SetInParent()
    config.response_cache.enable = cache
    _add(config, inputs, outputs)
    return config


def _warm_up(
    config: pb.ModelConfig, inputs: Iterable[Tensor], dims: Mapping[str, Sequence[int]], rows: CallRows
) -> None:
    """Have Triton run each bucket of rows before the model is ready, and prefer batches of these sizes."""
    config.dynamic_batching.preferred_batch_size.extend(rows.buckets)
    for count in rows.buckets:
        sample = config.model_warmup.add(name=f"{count} rows", batch_size=count)
        for tensor in inputs:
            zeros = sample.inputs[tensor.name]
            zeros.data_type, zeros.zero_data = pb.DataType.Value(f"TYPE_{tensor.dtype}"), True
            zeros.dims.extend(dims[tensor.name])


def _python_model(name: str, *, decoupled: bool) -> pb.ModelConfig:
    config = pb.ModelConfig(name=name, backend="python")
    config.model_transaction_policy.decoupled = decoupled
    config.instance_group.add(kind=pb.ModelInstanceGroup.KIND_CPU, count=1)
    return config


def _add(config: pb.ModelConfig, inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> None:
    for tensor in inputs:
        config.input.add(name=tensor.name, data_type=pb.DataType.Value(f"TYPE_{tensor.dtype}"), dims=tensor.dims)
    for tensor in outputs:
        config.output.add(name=tensor.name, data_type=pb.DataType.Value(f"TYPE_{tensor.dtype}"), dims=tensor.dims)
