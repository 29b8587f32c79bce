"""The client for ordinary code; `_async_client` is its twin for asyncio."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from imprompt import _transport
from imprompt._errors import ConnectionFailed, ImpromptError, InvalidRequest, Overloaded, ServerError
from imprompt._images import ImageInput
from imprompt._model import Capabilities, ServedModel, is_bundle, model_name, no_bundle, read_model
from imprompt._parameters import Parameters
from imprompt._request import Request, build_encode_request, build_request
from imprompt._result import Progress, Result, read_embeds, read_event, read_outputs, read_result
from imprompt._retry import MAX_RETRIES, PROBE_TIMEOUT_S, Budget, check_retries, check_timeout


class Client:
    """Asks a server for pictures. Threads may share one; use it as a context manager, or `close` it.

    Args:
        url: gRPC address of the server, `host:port` (default port: 8001). A server on this machine is never asked
            through a proxy.
        timeout: seconds for each request that does not say its own (default: no limit).
        max_retries: how often a request that a full server refuses is sent again, with growing pauses.
        credentials: for TLS, such as `grpc.ssl_channel_credentials()`.
        metadata: sent with every call, such as `{"authorization": "Bearer ..."}`.

    Every method raises `ConnectionFailed` when there is no server, or the client is closed.
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
        self._address = _transport.check_url(url)
        self._timeout, self._max_retries = check_timeout(timeout), check_retries(max_retries)
        self._metadata = _transport.as_metadata(metadata)
        _transport.check_credentials(credentials)
        options = _transport.channel_options(self._address)
        if credentials is None:
            self._channel = grpc.insecure_channel(self._address, options)
        else:
            self._channel = grpc.secure_channel(self._address, credentials, options)
        self._connected = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._closed = False
        self._models: dict[tuple[str, bool], ServedModel] = {}
        self._seen: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls under way are cancelled."""
        self._closed = True
        self._channel.close()

    def generate(self, *, model: str, prompt: str | Sequence[str], **parameters: Unpack[Parameters]) -> Result:
        """Ask for pictures (or a clip) and wait for them.

        Args:
            model: name of a bundle, one of `models()`.
            prompt: what to show; a list makes one picture (or more) of each.
            parameters: those of the diffusers pipelines, see `Parameters`.

        Raises:
            InvalidRequest: a parameter is wrong or unknown; the error names it.
            Overloaded: the server is full, after `max_retries` retries.
            DeadlineExceeded: `timeout` is over.
            Cancelled: the server broke the request off.
            ServerError: the server failed.
        """
        budget = self._budget(parameters.get("timeout"))
        request = build_request(self._model(model, budget), prompt, parameters)
        return read_result(self._infer(request, budget), request)

    def stream(
        self, *, model: str, prompt: str | Sequence[str], **parameters: Unpack[Parameters]
    ) -> Generator[Progress | Result, None, None]:
        """Like `generate`, but reports progress first: `Progress`, ..., then one `Result`.

        The request is checked at once, and sent with the first `next`; `timeout` counts from here. Closing the
        generator, or leaving it by an exception, stops the work.
        """
        budget = self._budget(parameters.get("timeout"))
        request = build_request(self._model(model, budget, stream=True), prompt, parameters)
        return self._events(request, budget)

    def encode_image(self, model: str, adapter: str, images: ImageInput | Sequence[ImageInput]) -> np.ndarray[Any, Any]:
        """Embeddings of `images` by an adapter's encoder, to be passed as `ip_adapter_image_embeds` again and again.

        Returns:
            float32 [2 (negative, positive), pictures, ...], the layout of diffusers' `prepare_ip_adapter_image_embeds`.
        """
        budget = self._budget()
        request = build_encode_request(self._model(model, budget), adapter, images)
        return read_embeds(self._infer(request, budget), adapter, request)

    def describe(self, model: str) -> Capabilities:
        """What a bundle can do: adapters, ControlNets, schedulers, defaults and limits."""
        model_name(model, stream=False)
        self._models.pop((model, False), None)
        return self._model(model, self._budget()).capabilities

    def models(self) -> list[str]:
        """Names of the bundles that are served."""
        return self._served(self._budget())

    def is_ready(self) -> bool:
        """Whether the server is there and all its models are ready."""
        try:
            return bool(self._ask(self._stub.ServerReady, service_pb2.ServerReadyRequest(), self._budget()).ready)
        except ImpromptError:
            return False

    @property
    def _stub(self) -> Any:
        if self._closed:
            raise ConnectionFailed(_transport.CLOSED)
        return self._connected

    def _budget(self, timeout: object = None) -> Budget:
        """What a call has: `timeout` (default: the client's) and retries."""
        return Budget(self._max_retries, self._timeout if timeout is None else check_timeout(timeout))

    def _model(self, bundle: str, budget: Budget, *, stream: bool = False) -> ServedModel:
        """What a model takes; asked for once."""
        name, key = model_name(bundle, stream=stream), (bundle, stream)
        while (model := self._models.get(key)) is None:
            try:
                model = read_model(self._config(name, budget, bundle), stream=stream)
            except InvalidRequest:
                raise no_bundle(bundle, self._served(budget)) from None
            except Overloaded as error:
                time.sleep(budget.pause(error))
            else:
                self._models[key] = model
                self._seen.add(bundle)
        return model

    def _served(self, budget: Budget) -> list[str]:
        # The repository index is closed to callers; statistics without a name are those of every model.
        answer = self._ask(self._stub.ModelStatistics, service_pb2.ModelStatisticsRequest(), budget)
        names = {model.name for model in answer.model_stats}
        return sorted(name for name in names if self._is_bundle(name, budget))

    def _is_bundle(self, name: str, budget: Budget) -> bool:
        try:
            return is_bundle(self._config(name, budget))
        except InvalidRequest:
            return False  # unloaded since it was listed

    def _config(self, name: str, budget: Budget, bundle: str = "") -> Any:
        """The configuration of the model `name`, which belongs to `bundle`."""
        return self._ask(self._stub.ModelConfig, service_pb2.ModelConfigRequest(name=name), budget, bundle).config

    def _ask(self, method: Any, message: Any, budget: Budget, bundle: str = "") -> Any:
        """A small question, answered at once."""
        try:
            return method(message, timeout=budget.question_timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._failure(error, None, budget, bundle) from error

    def _infer(self, request: Request, budget: Budget) -> dict[str, np.ndarray[Any, Any]]:
        while True:
            call = self._stub.ModelInfer.future(
                request.message(budget.remaining), timeout=budget.grpc_timeout, metadata=self._metadata
            )
            try:
                return read_outputs(call.result())
            except grpc.RpcError as error:
                failure = self._failure(error, request, budget, request.bundle)
                if not isinstance(failure, Overloaded):
                    raise failure from error
            finally:
                call.cancel()  # does nothing to a call that is done; stops the work if an interrupt came
            time.sleep(budget.pause(failure))

    def _events(self, request: Request, budget: Budget) -> Generator[Progress | Result, None, None]:
        answered = False
        while True:
            call = self._stub.ModelStreamInfer(
                iter([request.message(budget.remaining)]), timeout=budget.grpc_timeout, metadata=self._metadata
            )
            try:
                finished = False
                for answer in call:
                    event = read_event(answer, request)
                    answered, finished = True, isinstance(event, Result)
                    yield event
                if not finished:
                    raise ServerError("the answers ended without a result", request_id=request.id)
                return
            except grpc.RpcError as error:
                failure = self._failure(error, request, budget, request.bundle)
                if answered or not isinstance(failure, Overloaded):
                    raise failure from error
            finally:
                call.cancel()
            time.sleep(budget.pause(failure))

    def _failure(self, error: Any, request: Request | None, budget: Budget, bundle: str) -> ImpromptError:
        reachable = not _transport.may_be_unreachable(error) or self._is_live()
        expected = _transport.means_no_model(error) and (bundle in self._seen or not self.is_ready())
        failure = _transport.failure(error, self._address, request, budget, reachable=reachable, expected=expected)
        if request is not None and isinstance(failure, InvalidRequest):
            self._models.clear()  # the server may serve other versions by now
        return failure

    def _is_live(self) -> bool:
        try:
            self._stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=PROBE_TIMEOUT_S, metadata=self._metadata)
            return True
        except grpc.RpcError as error:
            return not _transport.means_nobody_there(error)
