"""Malicious or faulty callers affect only their own responses."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient, InferInput, service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException, deserialize_bytes_tensor, serialize_byte_tensor

from imprompt_serving.launcher import Server
from served import Served

# An engine that refuses negative numbers, and 7 on the first call, hosted like the engines of a bundle; and a model
# that calls it for every number, like a pipeline.
ENGINE = """
import numpy as np
from imprompt_serving.triton import engine

class Picky:
    tired = True

    def buckets_rows(self, device):
        return False

    def load(self, path, **options):
        return self

    def run(self, tensors):
        if (tensors["x"] < 0).any():
            raise ValueError(f"negative, says {object()}")
        if (tensors["x"] == 7).any() and self.tired:
            self.tired = False
            raise MemoryError("for the moment")
        return {"y": 10 * tensors["x"], "rows": np.full((len(tensors["x"]), 1), len(tensors["x"]), np.float32)}

engine.get_backend = lambda name: Picky()
TritonPythonModel = engine.TritonPythonModel
"""
ENGINE_CONFIG = """
backend: "python"
max_batch_size: 8
input [
  { name: "x" data_type: TYPE_FP32 dims: [1] },
  { name: "secret" data_type: TYPE_STRING dims: [1] }
]
output [{ name: "y" data_type: TYPE_FP32 dims: [1] }, { name: "rows" data_type: TYPE_FP32 dims: [1] }]
dynamic_batching { preferred_batch_size: [4] max_queue_delay_microseconds: 500000 }
instance_group [{ kind: KIND_CPU }]
parameters [{ key: "engine_backend" value: { string_value: "onnxruntime" } }]
response_cache { enable: true }
"""
FRONT = """
import asyncio
from types import SimpleNamespace
import numpy as np
import triton_python_backend_utils as pb_utils
from imprompt_serving.heartbeat import Heart
from imprompt_serving.triton.pipeline import TritonModels

class TritonPythonModel:
    def initialize(self, args):
        self.models = TritonModels(SimpleNamespace(host="python", model=str), 4, Heart("front"))

    async def execute(self, requests):
        return [await self.answer(request) for request in requests]

    async def answer(self, request):
        values = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
        said = await asyncio.gather(*map(self.ask, values))
        return pb_utils.InferenceResponse([pb_utils.Tensor("said", np.array(said, dtype=object))])

    async def ask(self, value):
        try:
            answer = await self.models.call("engine", {"x": np.array([[value]], np.float32)})
        except Exception as error:
            return str(error).encode()
        return f"{answer['y'].item():g} in a batch of {answer['rows'].item():g}".encode()
"""
FRONT_CONFIG = """
backend: "python"
input [{ name: "x" data_type: TYPE_FP32 dims: [-1] }]
output [{ name: "said" data_type: TYPE_STRING dims: [-1] }]
instance_group [{ kind: KIND_CPU }]
"""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InferenceServerClient]:
    repository = tmp_path_factory.mktemp("engine") / "repository"
    for name, code, config in (("engine", ENGINE, ENGINE_CONFIG), ("front", FRONT, FRONT_CONFIG)):
        write_model(repository / name, code, config)
    with Server(repository) as server, InferenceServerClient(server.grpc_address) as client:
        yield client
        server.check()


def write_model(folder: Path, code: str, config: str) -> None:
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.py").write_text(code)
    (folder / "config.pbtxt").write_text(config)


def tensor(name: str, values: Any) -> InferInput:
    array = np.asarray(values)
    dtypes = {"f": "FP32", "i": "INT64", "O": "BYTES"}
    given = InferInput(name, list(array.shape), dtypes[array.dtype.kind])
    given.set_data_from_numpy(array.astype(np.float32) if array.dtype.kind == "f" else array)
    return given


def ask(client: InferenceServerClient, *values: float) -> list[str]:
    said = client.infer("front", [tensor("x", np.array(values, float))]).as_numpy("said")
    return [text.decode() for text in said]


def test_bad_request_in_a_batch_fails_alone(engine: InferenceServerClient) -> None:
    assert ask(engine, 1, 2, 3, 4) == [f"{y} in a batch of 4" for y in (10, 20, 30, 40)]
    one, bad, two, three = ask(engine, 11, -1, 12, 13)
    assert [one, two, three] == [f"{y} in a batch of 1" for y in (110, 120, 130)]
    assert bad == "ValueError: negative, says <object object>"


def test_batch_of_bad_requests_does_not_crash_the_server(engine: InferenceServerClient) -> None:
    for _ in range(20):
        assert len(set(ask(engine, -1, -2, -3, -4))) == 1
    assert ask(engine, 5)[0].startswith("50 ")


@pytest.mark.parametrize("secret", [b"", b"guess", b":0", b"guess:0", b"\xff"], ids=repr)
def test_engine_refuses_calls_from_outside(engine: InferenceServerClient, secret: bytes) -> None:
    inputs = [tensor("x", [[1.0]]), tensor("secret", np.array([[secret]], dtype=object))]
    with pytest.raises(InferenceServerException, match="internal to its bundle") as error:
        engine.infer("engine", inputs)
    assert error.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_outside_calls_do_not_spoil_the_cache(engine: InferenceServerClient) -> None:
    """Triton 2.51 caches a refusal, and answers the next equal call with an empty response."""
    for _ in range(2):
        with suppress(InferenceServerException):
            engine.infer("engine", [tensor("x", [[21.0]]), tensor("secret", np.array([[b"guess"]], dtype=object))])
    assert ask(engine, 21) == ["210 in a batch of 1"]


def test_failures_are_not_answered_from_the_cache(engine: InferenceServerClient) -> None:
    assert ask(engine, 7) == ["MemoryError: for the moment"]
    assert ask(engine, 7) == ["70 in a batch of 1"]


@pytest.mark.parametrize(
    ("part", "tensors"),
    [
        ("denoiser", {"admit": [json.dumps({"id": "x", "rows": 10**6, "steps": 1000, "shape": "q"}).encode()]}),
        ("denoiser", {"cancel": [b"x"]}),
        ("denoiser", {"job": [b"{}"]}),
        (
            "text_encoder",
            {
                "input_ids": np.full((1, 77), 10**9),
                "clip_skip": np.zeros((1, 1), np.int64),
                "secret": np.array([[b"guess"]], dtype=object),
            },
        ),
    ],
    ids=["admit", "cancel", "job", "engine"],
)
def test_internal_models_of_a_bundle_refuse_calls_from_outside(
    sd15: Served, part: str, tensors: dict[str, Any]
) -> None:
    inputs = [tensor(name, np.array(v, dtype=object) if isinstance(v, list) else v) for name, v in tensors.items()]
    message = service_pb2.ModelInferRequest(model_name=f"sd15_{part}")
    for given in inputs:
        message.inputs.append(given._get_tensor())
        message.raw_input_contents.append(given._get_content())
    answers = list(stub(sd15).ModelStreamInfer(iter([message])))
    assert len(answers) == 1
    said = answers[0].error_message or " ".join(error_of(answers[0]))
    assert "accepts no calls from outside" in said
    assert sd15.generate(prompt="a cat", num_inference_steps=1, seed=0).images


def stub(served: Served) -> Any:
    return service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(served.server.grpc_address))


def error_of(answer: Any) -> list[str]:
    """Return status and message of the last response of a stream."""
    names = [output.name for output in answer.infer_response.outputs]
    raw = answer.infer_response.raw_output_contents[names.index("error")]
    return [text.decode() for text in deserialize_bytes_tensor(raw)]


def stream_request(steps: int, outputs: tuple[str, ...] = ()) -> Any:
    message = service_pb2.ModelInferRequest(model_name="sd15_stream")
    message.inputs.add(name="prompt", datatype="BYTES", shape=[1])
    message.inputs.add(name="num_inference_steps", datatype="INT32", shape=[1])
    message.raw_input_contents.append(serialize_byte_tensor(np.array([b"a cat"], dtype=object)).item())
    message.raw_input_contents.append(np.array([steps], np.int32).tobytes())
    for name in outputs:
        message.outputs.add(name=name)
    return message


@pytest.mark.parametrize("metadata", [(), (("triton_grpc_error", "true"),)], ids=["plain", "triton_grpc_error"])
def test_last_response_of_a_stream_has_the_error_status(sd15: Served, metadata: Any) -> None:
    """It is a tensor: Triton crashes on its own errors if callers ask for their status in a stream."""
    service = stub(sd15)
    for _ in range(20):
        (answer,) = service.ModelStreamInfer(iter([stream_request(0)]), metadata=metadata)
        assert not answer.error_message
        status, message = error_of(answer)
        assert status == "INVALID_ARGUMENT"
        assert message.startswith("num_inference_steps: ")


def test_requests_of_one_stream_fail_separately(sd15: Served) -> None:
    answers = list(stub(sd15).ModelStreamInfer(iter([stream_request(0), stream_request(1), stream_request(-1)])))
    names = [{output.name for output in answer.infer_response.outputs} for answer in answers]
    assert sum("error" in outputs for outputs in names) == 2
    assert sum("images" in outputs for outputs in names) == 1


def test_stream_that_requests_only_pictures_still_gets_the_error(sd15: Served) -> None:
    (answer,) = stub(sd15).ModelStreamInfer(iter([stream_request(0, ("images",))]))
    assert answer.error_message.startswith("num_inference_steps: ")


def over_http(served: Served, path: str, body: bytes) -> tuple[int, bytes]:
    assert served.server.http_address is not None
    connection = http.client.HTTPConnection(served.server.http_address, timeout=20)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_request_id_that_is_not_utf8_is_accepted(sd15: Served) -> None:
    body: dict[str, Any] = {
        "id": "@",
        "inputs": [{"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["a cat"]}],
    }
    steps: dict[str, Any] = {"name": "num_inference_steps", "datatype": "INT32", "shape": [1], "data": [0]}
    body["inputs"].append(steps)
    data = json.dumps(body).encode().replace(b'"@"', b'"\xff\xfe"')
    status, said = over_http(sd15, "/v2/models/sd15/infer", data)
    assert status == 400
    assert b"num_inference_steps: " in said
    steps["data"] = [1]
    data = json.dumps(body | {"outputs": [{"name": "seeds"}]}).encode().replace(b'"@"', b'"\xff\xfe"')
    assert over_http(sd15, "/v2/models/sd15/infer", data)[0] == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("systemsharedmemory/region/x/register", {"key": "/x", "offset": 0, "byte_size": 1}),
        ("cudasharedmemory/region/x/register", {"raw_handle": {"b64": ""}, "device_id": 0, "byte_size": 1}),
        ("systemsharedmemory/unregister", {}),
        ("logging", {"log_verbose_level": 9}),
        ("trace/setting", {"trace_level": ["TIMESTAMPS"]}),
        ("repository/index", {}),
        ("repository/models/sd15/unload", {}),
    ],
)
def test_administrative_apis_are_closed_over_http(sd15: Served, path: str, body: dict[str, Any]) -> None:
    assert over_http(sd15, f"/v2/{path}", json.dumps(body).encode())[0] == 403


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("SystemSharedMemoryRegister", service_pb2.SystemSharedMemoryRegisterRequest(name="x", key="/x", byte_size=1)),
        ("LogSettings", service_pb2.LogSettingsRequest()),
        ("TraceSetting", service_pb2.TraceSettingRequest()),
        ("RepositoryIndex", service_pb2.RepositoryIndexRequest()),
        ("RepositoryModelUnload", service_pb2.RepositoryModelUnloadRequest(model_name="sd15")),
    ],
)
def test_administrative_apis_are_closed_over_grpc(sd15: Served, method: str, message: Any) -> None:
    with pytest.raises(grpc.RpcError) as error:
        getattr(stub(sd15), method)(message)
    assert "restricted" in error.value.details()
    assert sd15.client.models() == ["sd15"]
