"""The pipeline as a Triton model: unary (async, one response) and streaming (decoupled) with the same code."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from imprompt_serving import metrics
from imprompt_serving.drain import admitted, check_drain_deadline
from imprompt_serving.errors import Cancelled, DeadlineExceeded, RequestError, unexpected
from imprompt_serving.heartbeat import CANARY_PARAMETER, Heart
from imprompt_serving.pipeline import shared_cache
from imprompt_serving.pipeline.canary import canary_request
from imprompt_serving.pipeline.flow import Pipeline
from imprompt_serving.pipeline.models import Models, Tensors
from imprompt_serving.pipeline.record import RequestRecord
from imprompt_serving.pipeline.request import parse
from imprompt_serving.pipeline.shared_cache import SharedCache, open_store
from imprompt_serving.request_log import RequestLog
from imprompt_serving.specs import Bundle
from imprompt_serving.tracing import HEADERS, Tracer, trace_id_of
from imprompt_serving.triton.internal import is_secret, with_secret
from imprompt_serving.triton.metrics import Metrics
from imprompt_serving.triton.tensors import arrays, failure, raise_for_error, response, send_final, texts, to_tensors

logger = logging.getLogger(__name__)
_POLL_S, _MAX_POLL_S, _CALLERS_PER_POLL = 0.02, 0.25, 4
"""Seconds between checks whether a caller has canceled. With more callers the interval grows up to the maximum, because
each check is a message to Triton and back."""
_RELEASE_DELAY_S = 5.0
"""Seconds for which to hold responses after a stream ends; see `_release`."""
_MAX_ID_LENGTH = 128
"""Number of characters of a caller's request id to use."""
_EXTRA_THREADS = 64
"""Threads beyond those for jobs, for example for cancellations, which must not wait for a thread."""


class TritonModels:
    """Calls the other models through BLS. Threads read streams, because their iterators would block the event loop."""

    def __init__(self, bundle: Bundle, threads: int, heart: Heart) -> None:
        self._bundle, self._heart = bundle, heart
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="stream")
        self.calls = ThreadPoolExecutor(threads, thread_name_prefix="call")
        self._generation = 0
        """Part of the keys in Triton's response cache; see `internal`."""

    async def call(self, model: str, tensors: Mapping[str, np.ndarray]) -> Tensors:
        with self._heart.call(model):
            return await self._call(model, tensors)

    async def _call(self, model: str, tensors: Mapping[str, np.ndarray]) -> Tensors:
        generation = self._generation
        answer = await _request(model, self._authenticated(model, tensors)).async_exec()
        if not answer.has_error() and not answer.output_tensors():
            # Triton 2.51 answers like this from its cache if the same call failed before: use new keys from now on.
            self._generation = max(self._generation, generation + 1)
            answer = await _request(model, self._authenticated(model, tensors)).async_exec()
        raise_for_error(answer)
        return arrays(answer)

    def _authenticated(self, model: str, tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Add the secret for models that imprompt hosts."""
        hosted = self._bundle.host == "python" or model == self._bundle.model("face_encoder")
        return with_secret(tensors, self._generation) if hosted else tensors

    async def stream(self, model: str, tensors: Mapping[str, np.ndarray]) -> AsyncIterator[Tensors]:
        """Yield the responses of a model. Reads to the end even if the caller stops: Triton keeps unread responses."""
        loop, answers = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def put(answer: Any) -> None:
            loop.call_soon_threadsafe(answers.put_nowait, answer)

        reading = loop.run_in_executor(self._threads, _read, _request(model, with_secret(tensors)), put)
        reading.add_done_callback(lambda done: loop.call_later(_RELEASE_DELAY_S, _release, done))
        while (answer := await answers.get()) is not None:
            if isinstance(answer, Exception):
                raise answer
            raise_for_error(answer)
            if answer.output_tensors():
                yield arrays(answer)


def _read(request: Any, put: Callable[[Any], None]) -> Any:
    """Send `request`, put every response (and an exception, if one occurs) and then None; return Triton's iterator."""
    answers = None
    try:
        answers = request.exec(decoupled=True)
        while (answer := next(answers, None)) is not None:
            put(answer)
    except Exception as error:
        put(error)
    put(None)
    return answers


def _release(reading: asyncio.Future[Any]) -> None:
    """Keep the responses alive until this call.

    When a stream ends, a thread of Triton also drops its references to them. If these were the last ones, that thread
    would free the arrays without holding the GIL, and could crash the process (`PbTensor` before Triton 2.53).
    """


def _request(model: str, tensors: Mapping[str, np.ndarray]) -> Any:
    """Make a request with outputs in CPU memory, for `as_numpy`: Triton's TensorRT backend leaves them on the GPU."""
    return pb_utils.InferenceRequest(
        model_name=model,
        requested_output_names=[],
        inputs=to_tensors(tensors),
        preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
    )


def _parameters(request: Any) -> dict[str, Any]:
    """Return the parameters of a request; empty if they are not UTF-8, which Triton does not check."""
    try:
        return dict(json.loads(request.parameters()))
    except ValueError:
        return {}


def _id_of(request: Any) -> str:
    """Return the caller's request id. Make one if there is none, or if it is not UTF-8, which Triton does not check."""
    try:
        return str(request.request_id())[:_MAX_ID_LENGTH] or uuid.uuid4().hex
    except UnicodeDecodeError:
        return uuid.uuid4().hex


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self._heart = Heart(args["model_instance_name"])
        folder = Path(args["model_repository"], args["model_version"])
        self._bundle = Bundle.load(folder)
        limits, shapes = self._bundle.limits, self._bundle.shapes
        max_jobs = len(self._bundle.denoisers) * (limits.waiting_rows + 2 * shapes.rows.max)
        self._models = TritonModels(self._bundle, max_jobs + _EXTRA_THREADS, self._heart)
        self._name = args["model_name"]
        self._metrics = Metrics(metrics.PIPELINE, self._name)
        self._pipeline = Pipeline(self._bundle, folder, self._cached(folder))
        self._tasks: set[asyncio.Future[Any]] = set()
        self._log, self._tracer = RequestLog.from_environment(), Tracer.from_environment()
        self._in_flight = self._metrics.of(metrics.IN_FLIGHT)
        policy = json.loads(args["model_config"]).get("model_transaction_policy", {})
        self._streaming = bool(policy.get("decoupled", False))
        self._canary = canary_request(self._bundle)
        self._heart.loaded()

    def _cached(self, folder: Path) -> Models:
        """Put the shared cache in front of the models, if there is one."""
        url = os.environ.get(shared_cache.VARIABLE)
        if not url:
            return self._models
        count = partial(self._metrics.add, metrics.SHARED_CACHE)
        return SharedCache.of_bundle(self._models, open_store(url), self._bundle, folder, count)

    async def execute(self, requests: list[Any]) -> None:
        """Start the requests. A unary model does not await them: Triton sends no others until this returns."""
        # Triton makes its calls on the default executor, which has few threads: slow calls would block all others.
        asyncio.get_running_loop().set_default_executor(self._models.calls)
        answers = [asyncio.ensure_future(self._answer(request)) for request in requests]
        for answer in answers:
            self._keep(answer)
        # Triton does not wait for this, but it leaks a coroutine that finishes before it is registered.
        if self._streaming:
            await asyncio.wait(answers)

    async def _answer(self, request: Any) -> None:
        """Send exactly one final response, whatever happens."""
        sender = request.get_response_sender()
        parameters = _parameters(request)
        if is_secret(parameters.get(CANARY_PARAMETER)):  # the launcher sent it to check the server
            with self._heart.canary.one():
                await self._send(sender, await self._canary_result(request), partial(self._canary_failure, request))
            return
        headers = {name: str(parameters[name]) for name in HEADERS if name in parameters}
        record = RequestRecord(id=_id_of(request), model=self._name, trace_headers=headers)
        failed = partial(self._failure, request, record)
        try:
            with admitted(self._in_flight.increment):
                answer, is_picture = await self._result(request, sender, record)
                await self._send(sender, answer, failed)
                if is_picture:
                    self._heart.sent_picture()
        except Exception as error:  # during a drain
            await self._send(sender, failed(error), failed)
        finally:
            self._report(record)

    def _report(self, record: RequestRecord) -> None:
        """Log a request that has ended, and export its span."""
        trace_id = trace_id_of(record) if self._tracer is None else self._tracer.export(record)
        self._log.write(record.line(bundle=self._bundle.name, trace_id=trace_id))

    async def _result(self, request: Any, sender: Any, record: RequestRecord) -> tuple[Any, bool]:
        """Return the final response, and whether it has a picture."""
        try:
            tensors = await self._serve(request, sender, record)
            answer = await asyncio.to_thread(response, tensors, request)
        except Exception as error:
            return self._failure(request, record, error), False
        self._metrics.add(metrics.REQUESTS, "OK")
        return answer, not tensors.keys().isdisjoint(("images", "frames", "encoded"))

    async def _canary_result(self, request: Any) -> Any:
        try:
            tensors = await self._pipeline.check(self._canary, f"canary-{uuid.uuid4().hex}")
            return response(tensors, request)
        except Exception as error:
            return self._canary_failure(request, error)

    def _canary_failure(self, request: Any, error: Exception) -> Any:
        return self._error_response(request, unexpected(error))

    async def _send(self, sender: Any, answer: Any, failed: Callable[[Exception], Any]) -> None:
        """Send the final response from a thread, because it copies pictures; if that fails, `failed` makes another."""
        try:
            await asyncio.to_thread(self._send_now, sender, answer)
        except Exception as error:
            with suppress(Exception):  # the sender may be closed
                send_final(sender, failed(error))

    def _send_now(self, sender: Any, answer: Any) -> None:
        with self._heart.sending.one():
            send_final(sender, answer)

    def _failure(self, request: Any, record: RequestRecord, error: Exception) -> Any:
        """Count and record `error`, and turn it into the final response of a request.

        In a stream, this response is a tensor: Triton would drop the status of an error, or, for callers that request
        the status (`triton_grpc_error`), crash after some hundreds of errors.
        """
        failed = record.error = unexpected(error)
        if failed is not error:
            logger.error("request %r failed", record.id, exc_info=error)
        self._metrics.add(metrics.REQUESTS, failed.status)
        return self._error_response(request, failed)

    def _error_response(self, request: Any, error: RequestError) -> Any:
        if self._streaming and "error" in request.requested_output_names():
            return response({"error": texts(error.status, str(error))})
        return failure(error)

    def finalize(self) -> None:
        self._metrics.close()
        self._log.close()
        if self._tracer is not None:
            self._tracer.close()
        self._heart.close()

    async def _serve(self, request: Any, sender: Any, record: RequestRecord) -> Tensors:
        loop = asyncio.get_running_loop()
        received = loop.time()
        # Decode pictures on a thread: it would block the event loop, which serves all callers.
        parsed = await loop.run_in_executor(None, lambda: parse(arrays(request), self._bundle))
        record.parsed(parsed, self._pipeline.rows(parsed))
        job_id = f"{record.id}-{uuid.uuid4().hex}"

        def progress(answer: Tensors) -> None:
            with self._heart.sending.one():
                sender.send(response(answer, request))

        reports = progress if self._streaming else None
        work = asyncio.ensure_future(self._pipeline.generate(parsed, job_id, record.stages, reports))
        deadline = received + parsed.timeout
        while not work.done():
            pause = min(_POLL_S * max(len(self._tasks) / _CALLERS_PER_POLL, 1.0), _MAX_POLL_S)
            await asyncio.wait({work}, timeout=pause)
            try:
                check_drain_deadline()
                if loop.time() > deadline:
                    raise DeadlineExceeded(parsed.timeout)
                if sender.is_cancelled():
                    raise Cancelled("canceled by the caller")
            except RequestError:
                if not work.done():
                    # Cancellation informs the denoiser, which may take a tick: do not make the caller wait for that.
                    work.cancel()
                    self._keep(work)
                    raise
        answer = work.result()
        for stage, seconds in json.loads(answer["timings"][0]).items() if "timings" in answer else ():
            if stage in metrics.STAGES:
                self._metrics.observe(metrics.STAGE_SECONDS, stage, seconds)
        return answer

    def _keep(self, task: asyncio.Future[Any]) -> None:
        """Hold a reference to `task` until it ends: the event loop holds only weak ones."""
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Future[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.warning("background task failed: %s", task.exception())
