"""Canaries: the smallest picture of a bundle, requested regularly to see whether the server still makes pictures."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor

from imprompt_serving.heartbeat import CANARY_PARAMETER

INTERVAL_S = 2.0
"""Pause between the answer of a canary and the next one. No canary is needed while callers get pictures."""
MAX_LOAD = 0.05
"""Canaries may take this share of the time of an idle server; with expensive ones, the pause is longer."""
REFUSED = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNIMPLEMENTED)
"""Answers which say that the canary itself is wrong, for example because the models are of an older version."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Front:
    """A model that callers reach: the pipeline of `bundle`, or its streaming twin."""

    bundle: str
    model: str
    streaming: bool


def read_fronts(repository: Path) -> list[Front]:
    """List the fronts of all bundles in `repository`; other models, which have no `capabilities`, are left out."""
    fronts = []
    for file in sorted(repository.glob("*/config.pbtxt")):
        config = text_format.Parse(file.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
        if "capabilities" in config.parameters:
            streaming = config.model_transaction_policy.decoupled
            name = file.parent.name
            bundle = name.removesuffix("_stream") if streaming else name
            fronts.append(Front(bundle=bundle, model=name, streaming=streaming))
    return fronts


class Canary:
    """Sends canaries to one front, on a thread. The watchdog reads the fields, all in monotonic seconds."""

    def __init__(self, front: Front, address: str, secret: str, *, max_interval: float) -> None:
        self.front = front
        self.waiting_since: float | None = None
        """When the canary was sent that is not answered yet."""
        self.last_good: float | None = None
        """When a canary, or a caller, last got a picture from this front."""
        self.failing_since: float | None = None
        """When canaries began to fail, one after the other."""
        self.error = ""
        self.refused = False
        """Whether the front answers that the canary itself is wrong: it cannot be watched this way."""
        self._address, self._secret, self._max_interval = address, secret, max_interval
        self._cost = float("inf")
        """Seconds of the fastest canary: under load, others wait rather than work."""
        self._stop = threading.Event()
        self._channel: grpc.Channel | None = None
        self._thread = threading.Thread(target=self._run, name=f"canary {front.model}", daemon=True)
        self._thread.start()

    def saw_picture(self, at: float | None) -> None:
        """Record when the front sent a picture, if it did. While callers get pictures, no canary is needed."""
        if at is not None and (self.last_good is None or at > self.last_good):
            self.last_good = at

    def close(self) -> None:
        """Stop, and abandon a canary that is not answered."""
        self._stop.set()
        if self._channel is not None:
            self._channel.close()

    def _run(self) -> None:
        while not self._stop.wait(self._pause()):
            began = time.monotonic()
            self.waiting_since = began
            try:
                self._send()
            except grpc.RpcError as error:
                self._failed(began, error.code(), str(error.details()))
            except ValueError as error:  # the channel was closed
                self._failed(began, None, str(error))
            else:
                self._cost = min(self._cost, time.monotonic() - began)
                self.saw_picture(time.monotonic())
                self.failing_since, self.error = None, ""
            self.waiting_since = None

    def _pause(self) -> float:
        """Return the seconds until the next canary; 0 for the first."""
        if self.last_good is None:
            return INTERVAL_S / 4 if self.error else 0.0
        pause = min(max(INTERVAL_S, self._cost / MAX_LOAD), self._max_interval)
        return max(self.last_good + pause - time.monotonic(), INTERVAL_S / 4)

    def _failed(self, began: float, status: grpc.StatusCode | None, message: str) -> None:
        self.error, self.refused = message, status in REFUSED
        if self.failing_since is None:
            self.failing_since = began

    def _send(self) -> None:
        """Request a picture, and wait as long as it takes.

        Raises:
            grpc.RpcError: the server answered with an error, or could not be reached.
        """
        if self._channel is None:
            self._channel = grpc.insecure_channel(self._address, [("grpc.enable_http_proxy", 0)])
        stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        request = service_pb2.ModelInferRequest(model_name=self.front.model, id="canary")
        request.parameters[CANARY_PARAMETER].string_param = self._secret
        request.inputs.add(name="prompt", datatype="BYTES", shape=[1])
        request.raw_input_contents.append(b"\0\0\0\0")  # one empty string
        if not self.front.streaming:
            stub.ModelInfer(request)
            return
        request.outputs.add(name="images")
        request.outputs.add(name="error")
        failure: _Failed | None = _Failed("UNKNOWN", "the stream ended without an answer")
        for answer in stub.ModelStreamInfer(iter([request])):
            failure = _failure_in(answer)
        if failure is not None:
            raise failure


class _Failed(grpc.RpcError):
    """A canary failed with an answer in its stream, in the form of a failed call."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self._status = status

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode[self._status]

    def details(self) -> str:
        return str(self)


def _failure_in(answer: Any) -> _Failed | None:
    """Return the failure that a message of a stream reports; None if it has a picture."""
    if answer.error_message:
        return _Failed("UNKNOWN", answer.error_message)
    for output, content in zip(answer.infer_response.outputs, answer.infer_response.raw_output_contents, strict=True):
        if output.name == "error":
            status, message = deserialize_bytes_tensor(content)
            return _Failed(status.decode(), message.decode())
    return None
