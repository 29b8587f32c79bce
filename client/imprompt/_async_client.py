"""The client for asyncio; `_client` is its twin for ordinary code, and has the longer descriptions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from types import TracebackType
from typing import Any, Never, Self

import grpc
import grpc.aio
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from imprompt import _transport
from imprompt._errors import ConnectionFailed, ImpromptError, InvalidRequest, Overloaded, ServerError
from imprompt._images import ImageInput
from imprompt._model import Capabilities, ServedModel, is_bundle, model_name, no_bundle, read_model
from imprompt._parameters import (
    Annotator,
    Embeds,
    Images,
    OutputFormat,
    OutputType,
    PerAdapterImages,
    Scale,
    Scheduler,
    WeightType,
    given,
)
from imprompt._request import Request, build_encode_request, build_request, check_request
from imprompt._result import Progress, Result, read_embeds, read_event, read_outputs, read_result
from imprompt._retry import MAX_RETRIES, PROBE_TIMEOUT_S, Budget, check_retries, check_timeout


class AsyncClient:
    """`Client` for asyncio: same arguments, methods and errors, awaited.

    Cancelling the task that awaits a request stops the work on the server. Each event loop gets a connection of its
    own, so a client may outlive `asyncio.run`; `close` it in the last loop that uses it.
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
        self._timeout, self._max_retries = check_timeout(timeout), check_retries(max_retries)
        self._metadata = _transport.as_metadata(metadata)
        _transport.check_credentials(credentials)
        self._connections: dict[asyncio.AbstractEventLoop, tuple[Any, Any]] = {}
        """By event loop: channel and stub."""
        self._closed = False
        self._models: dict[tuple[str, bool], ServedModel] = {}
        self._seen: set[str] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls under way are cancelled."""
        self._closed = True
        channel, _ = self._connections.pop(asyncio.get_running_loop(), (None, None))
        self._connections.clear()  # the loops of the others have ended, and their calls with them
        if channel is not None:
            await channel.close()

    async def generate(
        self,
        *,
        model: str,
        prompt: str | Sequence[str],
        # Made by imprompt_serving.signatures: arguments of generate
        negative_prompt: str | Sequence[str] | None = None,
        prompt_2: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        ip_adapter_image: PerAdapterImages | None = None,
        negative_ip_adapter_image: PerAdapterImages | None = None,
        ip_adapter_image_embeds: Embeds | Sequence[Embeds | None] | Mapping[str, Embeds] | None = None,
        ip_adapter_scale: Scale | Sequence[Scale] | Mapping[str, Scale | Sequence[float]] | None = None,
        ip_adapter_masks: PerAdapterImages | Sequence[Any] | None = None,
        ip_adapter_start: float | Sequence[float] | None = None,
        ip_adapter_end: float | Sequence[float] | None = None,
        ip_adapter_weight_type: WeightType | Sequence[WeightType] | None = None,
        image: Images | None = None,
        mask_image: Images | None = None,
        strength: float | None = None,
        padding_mask_crop: int | None = None,
        control_image: Images | Sequence[Sequence[ImageInput]] | None = None,
        control_image_annotator: Annotator | Sequence[Annotator] | None = None,
        controlnet: str | Sequence[str] | None = None,
        controlnet_conditioning_scale: float | Sequence[float] | None = None,
        control_guidance_start: float | Sequence[float] | None = None,
        control_guidance_end: float | Sequence[float] | None = None,
        guess_mode: bool | None = None,
        num_frames: int | None = None,
        video: Sequence[ImageInput] | np.ndarray[Any, Any] | None = None,
        context_length: int | None = None,
        context_stride: int | None = None,
        context_overlap: int | None = None,
        height: int | None = None,
        width: int | None = None,
        original_size: Sequence[int] | None = None,
        crops_coords_top_left: Sequence[int] | None = None,
        target_size: Sequence[int] | None = None,
        negative_original_size: Sequence[int] | None = None,
        negative_crops_coords_top_left: Sequence[int] | None = None,
        negative_target_size: Sequence[int] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        guidance_end: float | None = None,
        eta: float | None = None,
        clip_skip: int | None = None,
        num_images_per_prompt: int | None = None,
        seed: int | Sequence[int] | None = None,
        scheduler: Scheduler | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        output_type: OutputType | None = None,
        output_format: OutputFormat | None = None,
        timeout: float | None = None,
        priority: int | None = None,
        # End
        **unknown: Never,
    ) -> Result:
        """Ask for pictures (or a clip) and wait for them; see `Client.generate`."""
        parameters = given(locals())
        budget = self._budget(timeout)
        request = await asyncio.to_thread(build_request, await self._model(model, budget), prompt, parameters)
        return read_result(await self._infer(request, budget), request)

    def stream(
        self,
        *,
        model: str,
        prompt: str | Sequence[str],
        # Made by imprompt_serving.signatures: arguments of stream
        negative_prompt: str | Sequence[str] | None = None,
        prompt_2: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        ip_adapter_image: PerAdapterImages | None = None,
        negative_ip_adapter_image: PerAdapterImages | None = None,
        ip_adapter_image_embeds: Embeds | Sequence[Embeds | None] | Mapping[str, Embeds] | None = None,
        ip_adapter_scale: Scale | Sequence[Scale] | Mapping[str, Scale | Sequence[float]] | None = None,
        ip_adapter_masks: PerAdapterImages | Sequence[Any] | None = None,
        ip_adapter_start: float | Sequence[float] | None = None,
        ip_adapter_end: float | Sequence[float] | None = None,
        ip_adapter_weight_type: WeightType | Sequence[WeightType] | None = None,
        image: Images | None = None,
        mask_image: Images | None = None,
        strength: float | None = None,
        padding_mask_crop: int | None = None,
        control_image: Images | Sequence[Sequence[ImageInput]] | None = None,
        control_image_annotator: Annotator | Sequence[Annotator] | None = None,
        controlnet: str | Sequence[str] | None = None,
        controlnet_conditioning_scale: float | Sequence[float] | None = None,
        control_guidance_start: float | Sequence[float] | None = None,
        control_guidance_end: float | Sequence[float] | None = None,
        guess_mode: bool | None = None,
        num_frames: int | None = None,
        video: Sequence[ImageInput] | np.ndarray[Any, Any] | None = None,
        context_length: int | None = None,
        context_stride: int | None = None,
        context_overlap: int | None = None,
        height: int | None = None,
        width: int | None = None,
        original_size: Sequence[int] | None = None,
        crops_coords_top_left: Sequence[int] | None = None,
        target_size: Sequence[int] | None = None,
        negative_original_size: Sequence[int] | None = None,
        negative_crops_coords_top_left: Sequence[int] | None = None,
        negative_target_size: Sequence[int] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        guidance_end: float | None = None,
        eta: float | None = None,
        clip_skip: int | None = None,
        num_images_per_prompt: int | None = None,
        seed: int | Sequence[int] | None = None,
        scheduler: Scheduler | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        output_type: OutputType | None = None,
        output_format: OutputFormat | None = None,
        timeout: float | None = None,
        priority: int | None = None,
        progress_every: int | None = None,
        preview: bool | None = None,
        # End
        **unknown: Never,
    ) -> AsyncGenerator[Progress | Result, None]:
        """Like `generate`, but reports progress first: `Progress`, ..., then one `Result`.

        `timeout` counts from here. What can be checked at once is: the rest, and all of it for a model that this client
        has not asked for yet, when the request is sent with the first `anext`. Closing the generator (`aclose`), or
        leaving it by an exception, stops the work.
        """
        parameters = given(locals())
        budget = self._budget(timeout)
        model_name(model, stream=True)
        known = self._models.get((model, True))
        if known is not None:
            check_request(known, prompt, parameters)
        return self._events(model, prompt, parameters, budget)

    async def encode_image(
        self, model: str, adapter: str, images: ImageInput | Sequence[ImageInput]
    ) -> np.ndarray[Any, Any]:
        """Embeddings of `images`, float32 [2 (negative, positive), pictures, ...]; see `Client.encode_image`."""
        budget = self._budget()
        request = await asyncio.to_thread(build_encode_request, await self._model(model, budget), adapter, images)
        return read_embeds(await self._infer(request, budget), adapter, request)

    async def describe(self, model: str) -> Capabilities:
        """What a bundle can do: adapters, ControlNets, schedulers, defaults and limits."""
        model_name(model, stream=False)
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
        """That of the running event loop, made on first use: a channel belongs to one loop."""
        if self._closed:
            raise ConnectionFailed(_transport.CLOSED)
        loop = asyncio.get_running_loop()
        if loop not in self._connections:
            for ended in [known for known in self._connections if known.is_closed()]:
                del self._connections[ended]
            options = _transport.channel_options(self._address)
            if self._credentials is None:
                channel = grpc.aio.insecure_channel(self._address, options)
            else:
                channel = grpc.aio.secure_channel(self._address, self._credentials, options)
            self._connections[loop] = channel, service_pb2_grpc.GRPCInferenceServiceStub(channel)
        return self._connections[loop][1]

    def _budget(self, timeout: object = None) -> Budget:
        return Budget(self._max_retries, self._timeout if timeout is None else check_timeout(timeout))

    async def _model(self, bundle: str, budget: Budget, *, stream: bool = False) -> ServedModel:
        name, key = model_name(bundle, stream=stream), (bundle, stream)
        while (model := self._models.get(key)) is None:
            try:
                model = read_model(await self._config(name, budget, bundle), stream=stream)
            except InvalidRequest:
                raise no_bundle(bundle, await self._served(budget)) from None
            except Overloaded as error:
                await asyncio.sleep(budget.pause(error))
            else:
                self._models[key] = model
                self._seen.add(bundle)
        return model

    async def _served(self, budget: Budget) -> list[str]:
        # The repository index is closed to callers; statistics without a name are those of every model.
        answer = await self._ask(self._stub.ModelStatistics, service_pb2.ModelStatisticsRequest(), budget)
        names = sorted({model.name for model in answer.model_stats})
        bundles = await asyncio.gather(*(self._is_bundle(name, budget) for name in names))
        return [name for name, found in zip(names, bundles, strict=True) if found]

    async def _is_bundle(self, name: str, budget: Budget) -> bool:
        try:
            return is_bundle(await self._config(name, budget))
        except InvalidRequest:
            return False

    async def _config(self, name: str, budget: Budget, bundle: str = "") -> Any:
        request = service_pb2.ModelConfigRequest(name=name)
        return (await self._ask(self._stub.ModelConfig, request, budget, bundle)).config

    async def _ask(self, method: Any, message: Any, budget: Budget, bundle: str = "") -> Any:
        call = method(message, timeout=budget.question_timeout, metadata=self._metadata)
        try:
            return await call
        except (grpc.RpcError, asyncio.CancelledError) as error:
            raise await self._failure(error, call, None, budget, bundle) from error

    async def _infer(self, request: Request, budget: Budget) -> dict[str, np.ndarray[Any, Any]]:
        while True:
            call = self._stub.ModelInfer(
                request.message(budget.remaining), timeout=budget.grpc_timeout, metadata=self._metadata
            )
            try:
                return read_outputs(await call)
            except (grpc.RpcError, asyncio.CancelledError) as error:
                failure = await self._failure(error, call, request, budget, request.bundle)
                if not isinstance(failure, Overloaded):
                    raise failure from error
            finally:
                call.cancel()
            await asyncio.sleep(budget.pause(failure))

    async def _events(
        self, model: str, prompt: object, parameters: Mapping[str, object], budget: Budget
    ) -> AsyncGenerator[Progress | Result, None]:
        served = await self._model(model, budget, stream=True)
        request = await asyncio.to_thread(build_request, served, prompt, parameters)
        answered = False
        while True:
            call = self._stub.ModelStreamInfer(
                iter([request.message(budget.remaining)]), timeout=budget.grpc_timeout, metadata=self._metadata
            )
            failure: ImpromptError
            try:
                finished = False
                async for answer in call:
                    event = read_event(answer, request)
                    answered, finished = True, isinstance(event, Result)
                    yield event
                if not finished:
                    raise ServerError("the answers ended without a result", request_id=request.id)
                return
            except (grpc.RpcError, asyncio.CancelledError) as error:
                failure = await self._failure(error, call, request, budget, request.bundle)
                if answered or not isinstance(failure, Overloaded):
                    raise failure from error
            finally:
                call.cancel()
            await asyncio.sleep(budget.pause(failure))

    async def _failure(
        self, error: BaseException, call: Any, request: Request | None, budget: Budget, bundle: str
    ) -> ImpromptError:
        """The exception for a failed call; a cancellation of the caller's own task is raised on.

        grpc.aio reports a call that the *server* cancelled by the same exception.
        """
        if isinstance(error, asyncio.CancelledError):
            task = asyncio.current_task()
            if (task is not None and task.cancelling()) or not call.done():
                raise error
            error = await _status(call)
        reachable = not _transport.may_be_unreachable(error) or await self._is_live()
        expected = _transport.means_no_model(error) and (bundle in self._seen or not await self.is_ready())
        failure = _transport.failure(error, self._address, request, budget, reachable=reachable, expected=expected)
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
