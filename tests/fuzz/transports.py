"""Ways to send a case, and what came back. Each ends within its deadline, whatever the server does."""

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

    `status` is a gRPC status; `HTTP 200`; the name of an exception of the SDK or, if it is none of ours, `FOREIGN`;
    or `LEFT` (the caller went away), `STREAM ERROR` (a message of Triton's without a status), `SILENT` (the stream
    ended without a word) or `NEIGHBOR` (a harmless request sent beside it failed).
    """

    status: str
    message: str = ""
    seconds: float = 0.0


class Connections:
    """The ways to a server; threads may share one."""

    def __init__(self, grpc_address: str, http_address: str | None, deadline: float) -> None:
        self.deadline = deadline
        self.http_address = http_address
        # No retries: what a refusal is must be seen, and seen at once.
        self.client = Client(grpc_address, timeout=deadline, max_retries=0)
        self._channel = grpc.insecure_channel(grpc_address, _NO_LIMIT)

    def unary(self, method: str, answer: Callable[[bytes], Any]) -> Any:
        """A method that takes bytes, so that they need not be a message."""
        return self._channel.unary_unary(_SERVICE + method, lambda data: data, answer)

    def stream(self) -> Any:
        """`ModelStreamInfer` of bytes."""
        parse = service_pb2.ModelStreamInferResponse.FromString
        return self._channel.stream_stream(_SERVICE + "ModelStreamInfer", lambda data: data, parse)

    def close(self) -> None:
        self.client.close()
        self._channel.close()


class Sendable(Protocol):
    """A case that is ready to be sent."""

    def send(self, server: Connections) -> Answer: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Unary:
    """A call of one answer; the bytes are those of a request of `method`, unless they were spoilt."""

    data: bytes
    method: str = "ModelInfer"
    leave_after: float | None = None
    """Seconds after which the caller leaves."""

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

    Never with the metadata `triton_grpc_error`: with it Triton 2.51 crashes by itself after some hundred errors, and
    nothing of this project sends it.
    """

    data: tuple[bytes, ...]
    leave_after: float | None = None
    """Seconds after which the caller leaves, read or not."""
    read: int | None = None
    """Answers after which it leaves."""
    stay: bool = False
    """Whether it keeps its side open until the first answer is there."""

    def send(self, server: Connections) -> Answer:
        start, answered = time.monotonic(), Event()
        deadline = server.deadline if self.leave_after is None else min(self.leave_after, server.deadline)
        call = server.stream()(self._requests(answered, deadline), timeout=deadline)
        status, message, count = "SILENT", "", 0
        try:
            for answer in call:
                answered.set()
                count += 1
                status, message = _told(answer)
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
    """A call of the SDK: a method of `Client`, with keywords of any type."""

    method: str
    keywords: Mapping[str, Any]
    read: int | None = None
    """Events of a stream after which the caller leaves."""

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
    """A POST, where the server has an HTTP port (off by default).

    Two things are never sent, as they end Triton 2.51 before anything of this project sees them, and as only those are
    exposed who turn the port on: JSON nested 150,000 levels deep, and megabytes in chunks of one byte.
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
    """Several cases at once, so that Triton may put them into one batch, and a harmless one that must not suffer."""

    cases: tuple[Sendable, ...]
    harmless: Sendable
    times: int
    """That each of them is sent."""

    def send(self, server: Connections) -> Answer:
        with ThreadPoolExecutor(len(self.cases) + 1) as callers:
            calls = [callers.submit(self._repeated, case, server) for case in (self.harmless, *self.cases)]
            neighbor, *answers = (call.result() for call in calls)
        if neighbor.status != "OK":
            return Answer(status="NEIGHBOR", message=f"{neighbor.status} {neighbor.message}", seconds=neighbor.seconds)
        worst = max(answers, key=_badness)
        return Answer(status=worst.status, message=worst.message, seconds=max(answer.seconds for answer in answers))

    def _repeated(self, case: Sendable, server: Connections) -> Answer:
        """The worst answer of some: one that is not OK."""
        return max((case.send(server) for _ in range(self.times)), key=_badness)


def _badness(answer: Answer) -> tuple[bool, bool, float]:
    return answer.status in ("INTERNAL", "UNKNOWN"), answer.status != "OK", answer.seconds


def _failed(error: Any, start: float) -> Answer:
    return Answer(status=error.code().name, message=error.details() or "", seconds=time.monotonic() - start)


def _told(answer: Any) -> tuple[str, str]:
    """Status and message of one answer of a stream: those of its tensor `error`, if it has one."""
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
