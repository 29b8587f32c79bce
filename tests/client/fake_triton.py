"""A fake Triton server on a real port: serves model configurations, records requests, and responds as a test wants."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from PIL import Image
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor, np_to_triton_dtype, serialize_byte_tensor, triton_to_np_dtype

MANY, ONE = (-1,), (1,)
INPUTS = {
    "prompt": ("STRING", MANY),
    "negative_prompt": ("STRING", MANY),
    "ip_adapter_image": ("STRING", MANY),
    "ip_adapter_image_adapter": ("STRING", MANY),
    "negative_ip_adapter_image": ("STRING", MANY),
    "negative_ip_adapter_image_adapter": ("STRING", MANY),
    "ip_adapter_masks": ("STRING", MANY),
    "ip_adapter_masks_adapter": ("STRING", MANY),
    "ip_adapter_image_per": ("STRING", MANY),
    "ip_adapter_keyframes": ("INT32", MANY),
    "ip_adapter_scale": ("FP64", MANY),
    "ip_adapter_scale_config": ("STRING", ONE),
    "ip_adapter_start": ("FP64", MANY),
    "ip_adapter_weight_type": ("STRING", MANY),
    "image": ("STRING", MANY),
    "mask_image": ("STRING", MANY),
    "control_image": ("STRING", MANY),
    "controlnet": ("STRING", MANY),
    "controlnet_conditioning_scale": ("FP64", MANY),
    "guess_mode": ("BOOL", ONE),
    "video": ("STRING", MANY),
    "num_frames": ("INT32", ONE),
    "original_size": ("INT32", (2,)),
    "latents": ("FP32", (-1, -1, -1, -1)),
    "height": ("INT32", ONE),
    "width": ("INT32", ONE),
    "num_inference_steps": ("INT32", ONE),
    "guidance_scale": ("FP64", ONE),
    "seed": ("INT64", MANY),
    "scheduler": ("STRING", ONE),
    "scheduler_config": ("STRING", ONE),
    "lora": ("STRING", ONE),
    "output_type": ("STRING", ONE),
    "output_format": ("STRING", ONE),
    "preview": ("BOOL", ONE),
    "timeout": ("FP64", ONE),
    "encode_image": ("STRING", ONE),
}
EMBED_SIZE = 8


class Refusal(Exception):
    """Raised by an answer: a unary call ends with this status, a stream with a message that carries it."""

    def __init__(self, status: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class Aborted(Refusal):
    """Raised by an answer: the call itself ends with this status, even for a stream, as when a proxy aborts it."""


class TritonError(Exception):
    """Raised by an answer to a stream: an error from Triton itself, which has no status."""


@dataclass
class Call:
    """A request as received."""

    model: str
    id: str
    inputs: dict[str, np.ndarray]
    dtypes: dict[str, str]
    metadata: dict[str, str]
    seconds_left: float | None
    context: grpc.ServicerContext
    cancelled: threading.Event = field(default_factory=threading.Event)

    def texts(self, name: str) -> list[str]:
        return [value.decode() for value in self.inputs[name]]

    def pictures(self, name: str) -> list[Image.Image]:
        return [Image.open(io.BytesIO(data)) for data in self.inputs[name]]

    def colors(self, name: str) -> list[Any]:
        """The top left pixel of each picture."""
        return [image.getpixel((0, 0)) for image in self.pictures(name)]


Answers = Callable[[Call], Iterator[dict[str, np.ndarray]]]


def picture_answer(call: Call) -> Iterator[dict[str, np.ndarray]]:
    """Yield what a server sends: for a stream, progress; then a picture."""
    if call.model.endswith("_stream"):
        for step in (1, 2):
            yield {"step": np.array([step], np.int32), "steps": np.array([2], np.int32)}
    yield picture()


def picture(count: int = 1) -> dict[str, np.ndarray]:
    return {
        "images": np.arange(count * 8 * 16 * 3, dtype=np.uint8).reshape(count, 8, 16, 3),
        "seeds": np.arange(count, dtype=np.int64),
        "timings": texts(json.dumps({"total": 0.5})),
    }


def encoded(format: str, *colors: str) -> bytes:
    first, *rest = [Image.new("RGB", (16, 8), color) for color in colors]
    buffer = io.BytesIO()
    more: dict[str, Any] = {"save_all": True, "append_images": rest} if rest else {}
    first.save(buffer, format, **more)
    return buffer.getvalue()


def clips(count: int = 1, frames: int = 3) -> dict[str, np.ndarray]:
    pixels = np.zeros((count, frames, 8, 16, 3), np.uint8)
    pixels[:] = np.arange(frames, dtype=np.uint8)[None, :, None, None, None] * 100
    return {"frames": pixels, "seeds": np.zeros(count, np.int64)}


def opened(path: Path) -> Any:
    """Open a picture file without keeping a file handle."""
    return Image.open(io.BytesIO(path.read_bytes()))


def texts(*values: str | bytes) -> np.ndarray:
    return np.array([value.encode() if isinstance(value, str) else value for value in values], dtype=object)


def refuse(status: grpc.StatusCode, message: str) -> Answers:
    def answer(call: Call) -> Iterator[dict[str, np.ndarray]]:
        raise Refusal(status, message)
        yield {}

    return answer


def in_turn(*answers: Answers) -> Answers:
    """Use the next answer for each call, and the last one for all further calls."""
    rest = list(answers)

    def answer(call: Call) -> Iterator[dict[str, np.ndarray]]:
        return (rest.pop(0) if len(rest) > 1 else rest[0])(call)

    return answer


def until_cancelled(call: Call) -> Iterator[dict[str, np.ndarray]]:
    """Report one step of progress, then work until the caller cancels."""
    if call.model.endswith("_stream"):
        yield {"step": np.array([1], np.int32), "steps": np.array([100], np.int32)}
    call.cancelled.wait(10)
    raise Refusal(grpc.StatusCode.CANCELLED, "cancelled by the caller")


def config(name: str, adapters: tuple[str, ...], *, stream: bool = False) -> Any:
    made = model_config_pb2.ModelConfig(name=f"{name}_stream" if stream else name)
    embeds = {f"ip_adapter_image_embeds_{adapter}": ("FP32", (-1, -1, EMBED_SIZE)) for adapter in adapters}
    for tensor, (dtype, dims) in {**INPUTS, **embeds}.items():
        if stream or tensor != "preview":
            data_type = model_config_pb2.DataType.Value(f"TYPE_{dtype}")
            made.input.add(name=tensor, data_type=data_type, dims=dims, optional=tensor != "prompt")
    made.model_transaction_policy.decoupled = stream
    described = {
        "name": name,
        "family": "sd15",
        "ip_adapters": [
            {"name": a, "kind": "plain", "image_tokens": 4, "image_embeds": [EMBED_SIZE], "takes_images": True}
            for a in adapters
        ],
        "limits": {"height": [64, 512], "rows": 16},
    }
    made.parameters["capabilities"].string_value = json.dumps(described)
    return made


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Serves the bundles `one` (adapter `plain`), `two` (`plus`, `face`) and `none`; `one_unet` is part of a bundle."""

    def __init__(self) -> None:
        self.answer: Answers = picture_answer
        self.calls: list[Call] = []
        self.config_calls = 0
        self.config_delay = 0.0
        self.ready = True
        self.configs = {"one_unet": model_config_pb2.ModelConfig(name="one_unet")}
        for name, adapters in (("one", ("plain",)), ("two", ("plus", "face")), ("none", ())):
            for stream in (False, True):
                made = config(name, adapters, stream=stream)
                self.configs[made.name] = made

    def ServerLive(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        return service_pb2.ServerLiveResponse(live=True)

    def ServerReady(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        return service_pb2.ServerReadyResponse(ready=self.ready)

    def ModelStatistics(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        response = service_pb2.ModelStatisticsResponse()
        for name in self.configs:
            response.model_stats.add(name=name, version="1")
        return response

    def ModelConfig(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        self.config_calls += 1
        time.sleep(self.config_delay)
        if request.name not in self.configs:
            context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' is not found")
        return service_pb2.ModelConfigResponse(config=self.configs[request.name])

    def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        try:
            return list(self._answers(request, context))[-1]
        except Refusal as refusal:
            context.abort(refusal.status, refusal.message)

    def ModelStreamInfer(self, requests: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        try:
            for request in requests:
                for answer in self._answers(request, context):
                    yield service_pb2.ModelStreamInferResponse(infer_response=answer)
        except Aborted as aborted:
            context.abort(aborted.status, aborted.message)
        except Refusal as refusal:
            response = _to_response({"error": texts(refusal.status.name, refusal.message)})
            yield service_pb2.ModelStreamInferResponse(infer_response=response)
        except TritonError as error:
            yield service_pb2.ModelStreamInferResponse(error_message=str(error))

    def _answers(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        call = Call(
            model=request.model_name,
            id=request.id,
            inputs={
                tensor.name: _to_array(tensor, raw)
                for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)
            },
            dtypes={tensor.name: tensor.datatype for tensor in request.inputs},
            metadata=dict(context.invocation_metadata()),
            seconds_left=context.time_remaining(),
            context=context,
        )
        context.add_callback(call.cancelled.set)
        self.calls.append(call)
        for outputs in self.answer(call):
            yield _to_response(outputs)


def _to_array(tensor: Any, raw: bytes) -> np.ndarray:
    if tensor.datatype == "BYTES":
        values = deserialize_bytes_tensor(raw)
    else:
        values = np.frombuffer(raw, dtype=triton_to_np_dtype(tensor.datatype))
    return values.reshape(tuple(tensor.shape))


def _to_response(outputs: dict[str, np.ndarray]) -> Any:
    response = service_pb2.ModelInferResponse()
    for name, array in outputs.items():
        is_bytes = array.dtype == object
        response.outputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
        response.raw_output_contents.append(serialize_byte_tensor(array).item() if is_bytes else array.tobytes())
    return response


@contextmanager
def running(servicer: FakeTriton, credentials: grpc.ServerCredentials | None = None, port: int = 0) -> Iterator[str]:
    """Run `servicer` on `port` (0: a free one), with TLS if there are credentials, and yield its address."""
    server = grpc.server(ThreadPoolExecutor(8))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    address = f"127.0.0.1:{port}"
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait(5)
