"""The client for ordinary code; `_async_client` is its twin for asyncio."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from types import TracebackType
from typing import Any, Never, Self

import grpc
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

    def generate(
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
        """Ask for pictures (or a clip) and wait for them.

        The parameters are those of the diffusers pipelines, with their meaning and defaults; None stands for the
        default. A server may know more of them, or fewer: it refuses what it does not know by name.

        Args:
            model: name of a bundle, one of `models()`.
            prompt: what to show; a list makes one picture (or more) of each.
            negative_prompt: what to avoid: one for all prompts, or one each.
            prompt_2: prompts for the second text encoder (default: `prompt`).
            negative_prompt_2: negative prompts for the second text encoder (default: `negative_prompt`).
            ip_adapter_image: image prompts: a picture, a list with an entry for each adapter of the bundle (a picture,
                a list of pictures or None), or a dict by adapter name; the only adapter of a bundle takes a flat list.
            negative_ip_adapter_image: image prompts of the unconditional branch (default: none or an empty picture, as
                the adapter was trained).
            ip_adapter_image_embeds: embeddings in place of pictures, as `encode_image` and diffusers give them: [2
                (negative, positive) or 1 (positive), pictures, ...]; a list with one for each adapter, or a dict by
                adapter name.
            ip_adapter_scale: strength of the image prompt: a number, or a dict by block (`{'up': {'block_0': [0.0, 1.0,
                0.0]}}`); a list with one of those for each adapter, or a dict by adapter name; with masks an adapter's
                entry may be a list with a number for each of its pictures.
            ip_adapter_masks: regions: one mask for each picture, shaped like `ip_adapter_image`, or diffusers' tensors
                [1, pictures, H, W]; an image prompt acts where its mask is white.
            ip_adapter_start: share of the steps at which an adapter starts to act: one for all adapters, or one each (0
                to 1, default 0).
            ip_adapter_end: share of the steps at which an adapter stops acting: one for all adapters, or one each (0 to
                1, default 1).
            ip_adapter_weight_type: how the scale is spread over the layers, `linear`, `ease in`, `ease out`, `ease
                in-out`, `reverse in-out`, `weak input`, `weak middle`, `weak output`, `strong middle`, `style`,
                `composition` or `style and composition`: one for all adapters, or one each (default `linear`).
            image: pictures to start from: image-to-image, or inpainting with `mask_image`.
            mask_image: what to repaint (white): one, or one for each `image`.
            strength: how much of `image` or `video` is replaced; above 0, default as diffusers (0 to 1).
            padding_mask_crop: inpaint a crop around the mask with this margin in pixels (0 to 4096).
            control_image: a control image for each net in `controlnet`; lists in a list as in diffusers: for clips the
                frames of each net, for several prompts the images of each prompt.
            control_image_annotator: what makes the control image from a photo, `none` or `canny`: one for all nets, or
                one each (default `none`).
            controlnet: names of the ControlNets to use, in this order (default: all of the bundle).
            controlnet_conditioning_scale: strength of the ControlNets: one for all nets, or one each; default as
                diffusers (-10000 to 10000).
            control_guidance_start: share of the steps at which a net starts to act: one for all nets, or one each (0 to
                1, default 0).
            control_guidance_end: share of the steps at which a net stops acting: one for all nets, or one each (0 to 1,
                default 1).
            guess_mode: let the nets act on the conditional branch only, and less on the finer residuals (default
                false).
            num_frames: frames of a clip; without it (and `video`) the answer is pictures.
            video: frames to start from: video-to-video with `strength`.
            context_length: frames that the motion modules see at once; longer clips run in overlapping windows.
            context_stride: number of window widths: each twice the last, by skipping frames (1 to 8, default 1).
            context_overlap: frames that neighboring windows share, fewer than a window has (default 4).
            height: pixels, a multiple of 8 (default: the bundle's, or that of the picture to start from).
            width: pixels, a multiple of 8 (default: the bundle's, or that of the picture to start from).
            original_size: height and width of the picture that the model imagines.
            crops_coords_top_left: top and left of the crop that the model imagines (default 0, 0).
            target_size: height and width that the picture is meant for.
            negative_original_size: height and width of the picture that the model imagines, for the unconditional
                branch.
            negative_crops_coords_top_left: top and left of the crop that the model imagines, for the unconditional
                branch (default 0, 0).
            negative_target_size: height and width that the picture is meant for, for the unconditional branch.
            num_inference_steps: denoising steps (1 to 1000, default 50).
            guidance_scale: classifier-free guidance; at most 1 switches it off, default as diffusers (-10000 to 10000).
            guidance_rescale: rescaling of the guided noise as in arXiv 2305.08891 (0 to 1, default 0).
            guidance_end: share of the steps after which guidance stops; a step without it is half the work (0 to 1,
                default 1).
            eta: share of noise in each step of DDIM and TCD (0 to 1, default 0).
            clip_skip: layers of the text encoder to leave out (default 0).
            num_images_per_prompt: pictures (or clips) for each prompt (1 to 64, default 1).
            seed: what `torch.Generator('cpu').manual_seed` takes: one for all pictures together, or one each; random if
                not given, and the result has it.
            scheduler: class name of a diffusers scheduler (default: the bundle's).
            scheduler_config: values that replace those of the scheduler's configuration, or diffusers' whole
                `dict(pipe.scheduler.config)`.
            output_type: `pil` (default), `np` (uint8 [height, width, 3]) or `latent`.
            output_format: receive pictures (or clips) as encoded files instead of raw pixels.
            timeout: seconds after which the caller stops waiting and the work stops.
            priority: requests with a lower number go first (1 to 9, default 5).

        Raises:
            InvalidRequest: a parameter is wrong or unknown; the error names it.
            Overloaded: the server is full, after `max_retries` retries.
            DeadlineExceeded: `timeout` is over.
            Cancelled: the server broke the request off.
            ServerError: the server failed.
        """
        parameters = given(locals())
        budget = self._budget(timeout)
        request = build_request(self._model(model, budget), prompt, parameters)
        return read_result(self._infer(request, budget), request)

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
    ) -> Generator[Progress | Result, None, None]:
        """Like `generate`, but reports progress first: `Progress`, ..., then one `Result`.

        The request is checked at once, and sent with the first `next`; `timeout` counts from here. Closing the
        generator, or leaving it by an exception, stops the work.

        Args:
            others: as for `generate`.
            progress_every: steps between two progress answers (1 to 1000, default 1).
            preview: whether progress answers carry small pictures (default false).

        Raises:
            ImpromptError: as `generate`.
        """
        parameters = given(locals())
        budget = self._budget(timeout)
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
