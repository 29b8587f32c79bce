"""The client for asyncio; `_client` is its twin for ordinary code, and has the longer descriptions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
import grpc.aio
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from imprompt import _transport
from imprompt._errors import ImpromptError, InvalidRequest, Overloaded, ServerError
from imprompt._images import ImageInput
from imprompt._model import Capabilities, ServedModel, is_bundle, model_name, no_bundle, read_model
from imprompt._parameters import Parameters
from imprompt._request import Request, build_encode_request, build_request
from imprompt._result import Progress, Result, read_embeds, read_event, read_outputs, read_result
from imprompt._retry import MAX_RETRIES, PROBE_TIMEOUT_S, Budget, check_timeout


class AsyncClient:
    """`Client` for asyncio: same arguments, methods and errors, awaited. For one event loop.

    Cancelling the task that awaits a request stops the work on the server.
    """

    def __init__(
        self,
        url: str = "localhost:8001",
        *,
        timeout: float | None = None,
        max_retries: int = MAX_RETRIES,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Mapping[str, str] | Sequence[tuple[str, str]] | None = None,
    ) -> None:
        self._address, self._credentials = _transport.check_url(url), credentials
        self._metadata = _transport.as_metadata(metadata)
        self._timeout, self._max_retries = check_timeout(timeout), max_retries
        self._models: dict[tuple[str, bool], ServedModel] = {}
        self._channel: Any = None
        self._connected: Any = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls under way are cancelled."""
        if self._channel is not None:
            await self._channel.close()

    async def generate(self, *, model: str, prompt: str | Sequence[str], **parameters: Unpack[Parameters]) -> Result:
        """Ask for pictures (or a clip) and wait for them; see `Client.generate`."""
        budget = self._budget(parameters.get("timeout"))
        request = await asyncio.to_thread(build_request, await self._model(model, budget), prompt, parameters)
        return read_result(await self._infer(request, budget), request)

    async def stream(
        self, *, model: str, prompt: str | Sequence[str], **parameters: Unpack[Parameters]
    ) -> AsyncGenerator[Progress | Result, None]:
        """Like `generate`, but tells of the progress first: `Progress`, ..., then one `Result`.

        Closing the generator (`aclose`), or leaving it by an exception, stops the work.
        """
        budget = self._budget(parameters.get("timeout"))
        served = await self._model(model, budget, stream=True)
        request = await asyncio.to_thread(build_request, served, prompt, parameters)
        answered = False
        while True:
            call = self._stub.ModelStreamInfer(
                iter([request.message(budget.remaining)]),
                timeout=budget.grpc_timeout,
                metadata=self._metadata + _transport.STREAM_METADATA,
            )
            failure: ImpromptError
            try:
                finished = False
                async for answer in call:
                    answered = True
                    event = read_event(answer, request)
                    finished = isinstance(event, Result)
                    yield event
                if not finished:
                    raise ServerError("the answers ended without a result", request_id=request.id)
                return
            except (grpc.RpcError, asyncio.CancelledError) as error:
                failure = await self._failure(error, call, request, budget)
                if answered or not isinstance(failure, Overloaded):
                    raise failure from error
            finally:
                call.cancel()
            await asyncio.sleep(budget.pause(failure))

    async def encode_image(
        self, model: str, adapter: str, images: ImageInput | Sequence[ImageInput]
    ) -> np.ndarray[Any, Any]:
        """Embeddings of `images`, float32 [2 (negative, positive), pictures, ...]; see `Client.encode_image`."""
        budget = self._budget()
        request = await asyncio.to_thread(build_encode_request, await self._model(model, budget), adapter, images)
        return read_embeds(await self._infer(request, budget), adapter, request)

    async def describe(self, model: str) -> Capabilities:
        """What a bundle can do: adapters, ControlNets, schedulers, defaults and limits."""
        self._models.pop((model, False), None)
        return (await self._model(model, self._budget())).capabilities

    async def models(self) -> list[str]:
        """Names of the bundles that are served."""
        return await self._served(self._budget())

    async def is_ready(self) -> bool:
        """Whether the server is there and all its models are ready."""
        try:
            answer = await self._ask(self._stub.ServerReady, service_pb2.ServerReadyRequest(), self._budget())
            return bool(answer.ready)
        except ImpromptError:
            return False

    @property
    def _stub(self) -> Any:
        """Made on first use: a channel belongs to the event loop that runs then."""
        if self._channel is None:
            options = _transport.CHANNEL_OPTIONS
            if self._credentials is None:
                self._channel = grpc.aio.insecure_channel(self._address, options)
            else:
                self._channel = grpc.aio.secure_channel(self._address, self._credentials, options)
            self._connected = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        return self._connected

    def _budget(self, timeout: object = None) -> Budget:
        return Budget(self._max_retries, self._timeout if timeout is None else check_timeout(timeout))

    async def _model(self, bundle: str, budget: Budget, *, stream: bool = False) -> ServedModel:
        key = (bundle, stream)
        model = self._models.get(key)
        if model is None:
            try:
                model = read_model(await self._config(model_name(bundle, stream=stream), budget), stream=stream)
            except InvalidRequest:
                raise no_bundle(bundle, await self._served(budget)) from None
            self._models[key] = model
        return model

    async def _served(self, budget: Budget) -> list[str]:
        # The repository index is closed to callers; statistics without a name are those of every model.
        answer = await self._ask(self._stub.ModelStatistics, service_pb2.ModelStatisticsRequest(), budget)
        names = list(dict.fromkeys(model.name for model in answer.model_stats))
        configs = await asyncio.gather(*(self._config(name, budget) for name in names))
        return sorted(name for name, config in zip(names, configs, strict=True) if is_bundle(config))

    async def _config(self, name: str, budget: Budget) -> Any:
        return (await self._ask(self._stub.ModelConfig, service_pb2.ModelConfigRequest(name=name), budget)).config

    async def _ask(self, method: Any, message: Any, budget: Budget) -> Any:
        call = method(message, timeout=budget.question_timeout, metadata=self._metadata)
        try:
            return await call
        except (grpc.RpcError, asyncio.CancelledError) as error:
            raise await self._failure(error, call, None, budget) from error

    async def _infer(self, request: Request, budget: Budget) -> dict[str, np.ndarray[Any, Any]]:
        while True:
            call = self._stub.ModelInfer(
                request.message(budget.remaining), timeout=budget.grpc_timeout, metadata=self._metadata
            )
            try:
                return read_outputs(await call)
            except (grpc.RpcError, asyncio.CancelledError) as error:
                failure = await self._failure(error, call, request, budget)
                if not isinstance(failure, Overloaded):
                    raise failure from error
            finally:
                call.cancel()
            await asyncio.sleep(budget.pause(failure))

    async def _failure(self, error: BaseException, call: Any, request: Request | None, budget: Budget) -> ImpromptError:
        """The exception for a failed call; a cancellation of the caller's own task is raised on.

        grpc.aio reports a call that the *server* cancelled by the same exception.
        """
        if isinstance(error, asyncio.CancelledError):
            task = asyncio.current_task()
            if (task is not None and task.cancelling()) or not call.done():
                raise error
            error = await _status(call)
        reachable = not _transport.may_be_unreachable(error) or await self._is_live()
        failure = _transport.failure(error, self._address, request, budget, reachable=reachable)
        if request is not None and isinstance(failure, InvalidRequest):
            self._models.clear()
        return failure

    async def _is_live(self) -> bool:
        try:
            message = service_pb2.ServerLiveRequest()
            await self._stub.ServerLive(message, timeout=PROBE_TIMEOUT_S, metadata=self._metadata)
            return True
        except grpc.RpcError as error:
            return not _transport.means_nobody_there(error)


async def _status(call: Any) -> Any:
    """How a finished call ended, as the error that grpc.aio raises for all statuses but CANCELLED."""
    metadata = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(await call.code(), metadata, metadata, await call.details())
