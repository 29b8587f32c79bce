"""The pipeline as a Triton model: unary (async, one response) and streaming (decoupled) over the same code."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from imprompt_serving import metrics
from imprompt_serving.drain import admitted, check_drain_deadline
from imprompt_serving.errors import Cancelled, RequestError, unexpected
from imprompt_serving.pipeline.flow import Pipeline
from imprompt_serving.pipeline.models import Tensors
from imprompt_serving.pipeline.request import parse
from imprompt_serving.specs import Bundle
from imprompt_serving.triton.internal import with_secret
from imprompt_serving.triton.metrics import Metrics
from imprompt_serving.triton.tensors import arrays, failure, raise_for_error, response, send_final, texts, to_tensors

logger = logging.getLogger(__name__)
_POLL, _LONGEST_POLL, _POLLED_AT_ONCE = 0.02, 0.25, 4
"""Seconds between two looks at whether the caller is still there; longer for more callers than so many, since each look
is a message to Triton and back."""
_HELD = 5.0
"""Seconds for which answers are held after their end; see `_let_go`."""
_LONGEST_ID = 64
"""Characters of a caller's request id that show up in the names of its jobs."""
_MORE_THREADS = 64
"""For what is asked beside the jobs that run or wait: cancellations, say, must not stand in a line."""


class TritonModels:
    """The other models, by BLS. Streams are read in threads: their iterator blocks, and the event loop must not."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        self._bundle = bundle
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="stream")
        self.calls = ThreadPoolExecutor(threads, thread_name_prefix="call")
        self._generation = 0
        """Of the keys in Triton's response cache, see `internal`."""

    async def call(self, model: str, tensors: Mapping[str, np.ndarray]) -> Tensors:
        generation = self._generation
        answer = await _request(model, self._signed(model, tensors)).async_exec()
        if not answer.has_error() and not answer.output_tensors():
            # Triton 2.51 answers so from its cache what has failed before: leave that generation, once for all callers.
            self._generation = max(self._generation, generation + 1)
            answer = await _request(model, self._signed(model, tensors)).async_exec()
        raise_for_error(answer)
        return arrays(answer)

    def _signed(self, model: str, tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """With the secret for models that take one."""
        takes = self._bundle.host == "python" or model == self._bundle.model("face_encoder")
        return with_secret(tensors, self._generation) if takes else tensors

    async def stream(self, model: str, tensors: Mapping[str, np.ndarray]) -> AsyncIterator[Tensors]:
        """Read to the end even when nobody listens any more: Triton keeps what is not read."""
        loop, read = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def tell(answer: Any) -> None:
            loop.call_soon_threadsafe(read.put_nowait, answer)

        reading = loop.run_in_executor(self._threads, _read, _request(model, with_secret(tensors)), tell)
        reading.add_done_callback(lambda done: loop.call_later(_HELD, _let_go, done))
        while (answer := await read.get()) is not None:
            if isinstance(answer, Exception):
                raise answer
            raise_for_error(answer)
            if answer.output_tensors():
                yield arrays(answer)


def _read(request: Any, tell: Callable[[Any], None]) -> Any:
    """Send ``request``, and tell of every answer, or of what went wrong, and then None. Returns Triton's iterator."""
    answers = None
    try:
        answers = request.exec(decoupled=True)
        while (answer := next(answers, None)) is not None:
            tell(answer)
    except Exception as error:
        tell(error)
    tell(None)
    return answers


def _let_go(reading: asyncio.Future[Any]) -> None:
    """Hold the answers that were read until here.

    When they have ended, a thread of Triton's lets go of them too. If that were the last one to do so, it would free
    their arrays without holding Python's lock, and sooner or later crash the process (`PbTensor` before Triton 2.53).
    """


def _request(model: str, tensors: Mapping[str, np.ndarray]) -> Any:
    """A request whose answer is wanted where ``as_numpy`` can read it: Triton's TensorRT leaves it on the GPU."""
    return pb_utils.InferenceRequest(
        model_name=model,
        requested_output_names=[],
        inputs=to_tensors(tensors),
        preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
    )


def _id_of(request: Any) -> str:
    """The caller's id of a request; empty if it is not UTF-8, which Triton lets pass."""
    try:
        return str(request.request_id())
    except UnicodeDecodeError:
        return ""


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        folder = Path(args["model_repository"], args["model_version"])
        self._bundle = Bundle.load(folder)
        limits, shapes = self._bundle.limits, self._bundle.shapes
        most = len(self._bundle.denoisers) * (limits.waiting_rows + 2 * shapes.rows.max)
        self._models = TritonModels(self._bundle, most + _MORE_THREADS)
        self._pipeline = Pipeline(self._bundle, folder, self._models)
        self._tasks: set[asyncio.Future[Any]] = set()
        self._metrics = Metrics(metrics.PIPELINE, args["model_name"])
        self._in_flight = self._metrics.of(metrics.IN_FLIGHT)
        policy = json.loads(args["model_config"]).get("model_transaction_policy", {})
        self._streaming = bool(policy.get("decoupled", False))

    async def execute(self, requests: list[Any]) -> None:
        """Take the requests. A unary model waits for none of them: before this returns Triton brings it no others."""
        # Triton makes its calls in the default executor, which has few threads: slow ones would keep up all others.
        asyncio.get_running_loop().set_default_executor(self._models.calls)
        answers = [asyncio.ensure_future(self._answer(request)) for request in requests]
        for answer in answers:
            self._keep(answer)
        if self._streaming:  # Triton waits for none of this, but never forgets what has ended before it looked
            await asyncio.wait(answers)

    async def _answer(self, request: Any) -> None:
        """Send exactly one final answer, whatever happens."""
        sender = request.get_response_sender()
        try:
            with admitted(self._in_flight.increment):
                await self._send(request, sender, await self._result(request, sender))
        except Exception as error:  # during a drain
            await self._send(request, sender, self._failure(request, error))

    async def _result(self, request: Any, sender: Any) -> Any:
        try:
            answer = await asyncio.to_thread(response, await self._serve(request, sender), request)
        except Exception as error:
            return self._failure(request, error)
        self._metrics.add(metrics.REQUESTS, "OK")
        return answer

    async def _send(self, request: Any, sender: Any, answer: Any) -> None:
        """Send the final answer, whose pictures are copied off the event loop; if that fails, send the error."""
        try:
            await asyncio.to_thread(send_final, sender, answer)
        except Exception as error:
            with suppress(Exception):  # it may have been closed
                send_final(sender, self._failure(request, error))

    def _failure(self, request: Any, error: Exception) -> Any:
        """Count and log `error`, and turn it into the answer that ends a request.

        In a stream that is a tensor: there Triton drops the status of its own errors, or, for callers that ask for it
        (`triton_grpc_error`), crashes after some hundreds of them.
        """
        failed = unexpected(error)
        if failed is not error:
            logger.error("request %r failed", _id_of(request), exc_info=error)
        self._metrics.add(metrics.REQUESTS, failed.status)
        if self._streaming and "error" in request.requested_output_names():
            return response({"error": texts(failed.status, str(failed))})
        return failure(failed)

    def finalize(self) -> None:
        self._metrics.close()

    async def _serve(self, request: Any, sender: Any) -> Tensors:
        loop = asyncio.get_running_loop()
        came = loop.time()
        # Decoding pictures takes long enough to be kept off the event loop, which serves all callers.
        wanted = await loop.run_in_executor(None, lambda: parse(arrays(request), self._bundle))
        job_id = f"{_id_of(request)[:_LONGEST_ID] or 'request'}-{uuid.uuid4().hex}"

        def progress(answer: Tensors) -> None:
            sender.send(response(answer, request))

        work = asyncio.ensure_future(self._pipeline.generate(wanted, job_id, progress if self._streaming else None))
        deadline = came + wanted.timeout
        while not work.done():
            pause = min(_POLL * max(len(self._tasks) / _POLLED_AT_ONCE, 1.0), _LONGEST_POLL)
            await asyncio.wait({work}, timeout=pause)
            try:
                check_drain_deadline()
                if loop.time() > deadline:
                    raise Cancelled(f"timeout: {wanted.timeout:g} seconds are over")
                if sender.is_cancelled():
                    raise Cancelled("cancelled by its caller")
            except RequestError:
                if not work.done():
                    # It has to tell the denoiser, which may take a tick: the caller need not wait for that.
                    work.cancel()
                    self._keep(work)
                    raise
        answer = work.result()
        for stage, seconds in json.loads(answer["timings"][0]).items() if "timings" in answer else ():
            if stage in metrics.STAGES:
                self._metrics.observe(metrics.STAGE_SECONDS, stage, seconds)
        return answer

    def _keep(self, task: asyncio.Future[Any]) -> None:
        """Let ``task`` run to its end: the event loop itself may forget it."""
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Future[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.warning("nobody was told of this error: %s", task.exception())
