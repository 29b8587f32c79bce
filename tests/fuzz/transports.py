"""Ways to send a case and read its answer. Each ends within its deadline, whatever the server does."""

from __future__ import annotations

import http.client
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import Any, Protocol

import grpc
from tritonclient.grpc import service_pb2

from imprompt import Client, ImpromptError, Result

_SERVICE = "/inference.GRPCInferenceService/"
_NO_LIMIT = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """How a case ended.

    `status` is a gRPC status; an HTTP status such as `HTTP 200`; the name of an SDK exception, or `FOREIGN` for any
    other exception; or `LEFT` (the caller canceled), `STREAM ERROR` (an error from Triton without a status), `SILENT`
    (the stream ended without a message) or `NEIGHBOR` (a harmless request sent at the same time failed).
    """

    status: str
    message: str = ""
    seconds: float = 0.0


class Connections:
    """Connections to a server by every transport; thread-safe."""

    def __init__(self, grpc_address: str, http_address: str | None, deadline: float) -> None:
        self.deadline = deadline
        self.http_address = http_address
        # No retries, so that refusals are seen immediately.
        self.client = Client(grpc_address, timeout=deadline, max_retries=0)
        self._channel = grpc.insecure_channel(grpc_address, _NO_LIMIT)

    def unary(self, method: str, answer: Callable[[bytes], Any]) -> Any:
        """Return a unary method that sends raw bytes, which need not be a valid message."""
        return self._channel.unary_unary(_SERVICE + method, lambda data: data, answer)

    def stream(self) -> Any:
        """Return a `ModelStreamInfer` that sends raw bytes."""
        parse = service_pb2.ModelStreamInferResponse.FromString
        return self._channel.stream_stream(_SERVICE + "ModelStreamInfer", lambda data: data, parse)

    def close(self) -> None:
        self.client.close()
        self._channel.close()


class Sendable(Protocol):
    """A case ready to send."""

    def send(self, server: Connections) -> Answer: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Unary:
    """A unary call; `data` is a serialized request of `method`, intact or corrupted."""

    data: bytes
    method: str = "ModelInfer"
    leave_after: float | None = None
    """Seconds after which the caller cancels."""

    def send(self, server: Connections) -> Answer:
        start = time.monotonic()
        call = server.unary(self.method, lambda data: data).future(self.data, timeout=server.deadline)
        try:
            call.result(self.leave_after)
            return Answer(status="OK", seconds=time.monotonic() - start)
        except grpc.FutureTimeoutError:
            call.cancel()
            return Answer(status="LEFT", seconds=time.monotonic() - start)
        except grpc.RpcError as error:
            return _failed(error, start)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """A stream of one or more requests.

    Never sets `triton_grpc_error` in the metadata: it makes Triton 2.51 crash after some hundreds of errors, and this
    project never uses it.
    """

    data: tuple[bytes, ...]
    leave_after: float | None = None
    """Seconds after which the caller cancels, even if it has read nothing."""
    read: int | None = None
    """Number of messages after which the caller cancels."""
    stay: bool = False
    """Whether the caller keeps its side open until the first message arrives."""

    def send(self, server: Connections) -> Answer:
        start, answered = time.monotonic(), Event()
        deadline = server.deadline if self.leave_after is None else min(self.leave_after, server.deadline)
        call = server.stream()(self._requests(answered, deadline), timeout=deadline)
        status, message, count = "SILENT", "", 0
        try:
            for answer in call:
                answered.set()
                count += 1
                status, message = _status_and_message(answer)
                if self.read is not None and count >= self.read:
                    status = "LEFT" if status == "OK" else status
                    break
            return Answer(status=status, message=message, seconds=time.monotonic() - start)
        except grpc.RpcError as error:
            if self.leave_after is not None and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return Answer(status="LEFT", seconds=time.monotonic() - start)
            return _failed(error, start)
        finally:
            answered.set()
            call.cancel()

    def _requests(self, answered: Event, deadline: float) -> Iterator[bytes]:
        yield from self.data
        if self.stay:
            answered.wait(deadline)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sdk:
    """A call of a `Client` method, with keywords of any type."""

    method: str
    keywords: Mapping[str, Any]
    read: int | None = None
    """Number of events after which the caller closes a stream."""

    def send(self, server: Connections) -> Answer:
        start = time.monotonic()
        try:
            answer = getattr(server.client, self.method)(**self.keywords)
            status = self._read(answer) if self.method == "stream" else "OK"
            return Answer(status=status, seconds=time.monotonic() - start)
        except ImpromptError as error:
            return Answer(status=type(error).__name__, message=str(error), seconds=time.monotonic() - start)
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            return Answer(status="FOREIGN", message=message, seconds=time.monotonic() - start)

    def _read(self, events: Any) -> str:
        status = "SILENT"
        for count, event in enumerate(events, 1):
            status = "OK" if isinstance(event, Result) else "LEFT"
            if self.read is not None and count >= self.read:
                events.close()
                break
        return status


@dataclass(frozen=True, kw_only=True, slots=True)
class Http:
    """An HTTP POST, for servers with an HTTP port (off by default).

    Two things are never sent, because they crash Triton 2.51 before any code of this project runs: JSON nested 150,000
    levels deep, and megabytes in chunks of one byte. Only servers with the port turned on are exposed to them.
    """

    path: str
    body: bytes
    headers: Mapping[str, str]

    def send(self, server: Connections) -> Answer:
        start = time.monotonic()
        connection = http.client.HTTPConnection(server.http_address or "", timeout=server.deadline)
        try:
            connection.request("POST", self.path, self.body, dict(self.headers))
            answer = connection.getresponse()
            text = answer.read().decode("latin-1")
            message = "" if answer.status == 200 else text
            return Answer(status=f"HTTP {answer.status}", message=message, seconds=time.monotonic() - start)
        except (OSError, http.client.HTTPException) as error:
            message = f"{type(error).__name__}: {error}"
            return Answer(status="HTTP CLOSED", message=message, seconds=time.monotonic() - start)
        finally:
            connection.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class Crowd:
    """Several cases at once, so that Triton may batch them, with a harmless request that must not be affected."""

    cases: tuple[Sendable, ...]
    harmless: Sendable
    times: int
    """How often each of them is sent."""

    def send(self, server: Connections) -> Answer:
        with ThreadPoolExecutor(len(self.cases) + 1) as callers:
            calls = [callers.submit(self._repeated, case, server) for case in (self.harmless, *self.cases)]
            neighbor, *answers = (call.result() for call in calls)
        if neighbor.status != "OK":
            return Answer(status="NEIGHBOR", message=f"{neighbor.status} {neighbor.message}", seconds=neighbor.seconds)
        worst = max(answers, key=_severity)
        return Answer(status=worst.status, message=worst.message, seconds=max(answer.seconds for answer in answers))

    def _repeated(self, case: Sendable, server: Connections) -> Answer:
        """Send a case several times and return the worst answer."""
        return max((case.send(server) for _ in range(self.times)), key=_severity)


def _severity(answer: Answer) -> tuple[bool, bool, float]:
    return answer.status in ("INTERNAL", "UNKNOWN"), answer.status != "OK", answer.seconds


def _failed(error: Any, start: float) -> Answer:
    return Answer(status=error.code().name, message=error.details() or "", seconds=time.monotonic() - start)


def _status_and_message(answer: Any) -> tuple[str, str]:
    """Return status and message of one stream message, from its `error` tensor if it has one."""
    if answer.error_message:
        return "STREAM ERROR", answer.error_message
    response = answer.infer_response
    for output, data in zip(response.outputs, response.raw_output_contents, strict=False):
        if output.name == "error":
            status, message = _texts(data)
            return status, message
    return "OK", ""


def _texts(data: bytes) -> list[str]:
    texts = []
    while data:
        (size,) = struct.unpack_from("<I", data)
        texts.append(data[4 : 4 + size].decode("utf-8", "replace"))
        data = data[4 + size :]
    return texts
