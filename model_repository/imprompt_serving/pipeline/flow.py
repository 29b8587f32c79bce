"""Run the engine calls of one request in order. The caller passes in access to the models, so Triton is not needed."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import numpy as np

from imprompt_serving import tensor_names
from imprompt_serving.errors import RequestError
from imprompt_serving.job_request import Admission, JobRequest, batch_key
from imprompt_serving.pipeline.dispatch import Dispatcher
from imprompt_serving.pipeline.encode import ImagePromptEncoder, control_tensors, encode_start
from imprompt_serving.pipeline.encode_text import TextPromptEncoder
from imprompt_serving.pipeline.models import Models, Tensors, raise_for_error, strings
from imprompt_serving.pipeline.output_files import file_tensor
from imprompt_serving.pipeline.postprocess import Postprocessor
from imprompt_serving.pipeline.request import Request
from imprompt_serving.pipeline.stages import Stages
from imprompt_serving.specs import Bundle


class Pipeline:
    """Serves the requests of one bundle."""

    def __init__(self, bundle: Bundle, folder: Path, models: Models) -> None:
        self._bundle, self._models = bundle, models
        self._text = TextPromptEncoder(bundle, folder, models)
        self._images = ImagePromptEncoder(bundle, models)
        self._postprocess = Postprocessor(bundle, models)
        self._dispatcher = Dispatcher(bundle, models)

    async def generate(
        self, request: Request, job_id: str, stages: Stages, progress: Callable[[Tensors], None] | None = None
    ) -> Tensors:
        """Generate the pictures (or latents, or embeddings) of one request. Cancellation also stops the denoising.

        Args:
            job_id: id of the denoising job.
            stages: gets the times of the stages, also of a request that fails.
            progress: called with the tensors of each progress message: steps done, total steps, previews if enabled.

        Returns:
            The tensors of the response.
        """
        if request.encode_image is not None:
            return await self._image_embeds_only(request, request.encode_image, stages)
        if request.encode_prompt:
            return await self._text_embeds_only(request, stages)
        started, warnings = time.perf_counter(), set[str]()
        admission = self._admission(request, job_id)
        with stages.measure("admission"):
            denoiser = await self._dispatcher.admit(admission)
        async with self._dispatcher.reservation(denoiser, admission):
            parts = await _gather(
                self._text.encode(request, stages, warnings),
                self._images.encode(request, stages),
                encode_start(request, self._bundle, self._models, stages),
                control_tensors(request),
            )
            tensors = {name: tensor for part in parts for name, tensor in part.items()}
            if request.latents is not None:
                tensors["latents"] = request.latents
            job = self._job(request, admission.id, time.perf_counter() - started, reports_progress=progress is not None)
            latents = await self._denoise(denoiser, job, tensors, progress, stages)
        result = await self._postprocess(request, latents, stages)
        # One seed for several pictures reproduces all of them together, but none on its own.
        reproducible = len(request.seeds) == request.pictures
        result["seeds"] = np.array(request.seeds if reproducible else (), np.int64)
        result |= _warnings(warnings)
        result["timings"] = strings(json.dumps(stages.seconds | {"total": time.perf_counter() - started}))
        return result

    async def check(self, request: Request, job_id: str) -> Tensors:
        """Make a picture on every denoiser of the bundle, for the watchdog: without admission, and outside of metrics.

        Returns:
            The tensors of the response with the first denoiser's picture.
        """
        stages = Stages()
        parts = await _gather(
            self._text.encode(request, stages, set()),
            self._images.encode(request, stages),
            encode_start(request, self._bundle, self._models, stages),
        )
        tensors = {name: tensor for part in parts for name, tensor in part.items()}
        job = self._job(request, job_id, 0.0, reports_progress=False)
        latents = await asyncio.gather(
            *(self._denoise(denoiser, job, tensors, None, stages) for denoiser in self._bundle.denoisers)
        )
        return await self._postprocess(request, latents[0], stages)

    def rows(self, request: Request) -> int:
        """Return the number of rows of a request's denoising job."""
        return request.pictures * (request.frames or 1) * (2 if self._bundle.guided(request) else 1)

    def _admission(self, request: Request, job_id: str) -> Admission:
        """Describe what a request will cost a denoiser."""
        settings = request.settings
        start = 0.0 if request.task == "text-to-image" else 1.0 - settings.strength
        if settings.denoising_start is not None:
            start = settings.denoising_start
        end = 1.0 if settings.denoising_end is None else settings.denoising_end
        return Admission(
            id=job_id,
            rows=self.rows(request),
            steps=max(round(settings.steps * (end - start)), 1),
            batch_key=batch_key(
                self._bundle,
                settings,
                request.frames,
                request.context,
                regions=request.regions,
                text_tokens=request.text.tokens or self._bundle.text_encoders[0].max_length,
            ),
        )

    async def _image_embeds_only(self, request: Request, adapter: str, stages: Stages) -> Tensors:
        prompt = next(prompt for prompt in request.image_prompts if prompt.adapter.name == adapter)
        if prompt.adapter.uses_face:
            return {tensor_names.image_embeds(adapter): await self._images.faces(prompt, stages)}
        negative, positive = await self._images.features(prompt, True, stages)
        assert negative is not None  # because guided
        return {tensor_names.image_embeds(adapter): np.stack([negative, positive])}

    async def _text_embeds_only(self, request: Request, stages: Stages) -> Tensors:
        warnings = set[str]()
        return await self._text.encode(request, stages, warnings) | _warnings(warnings)

    def _job(self, request: Request, job_id: str, seconds: float, *, reports_progress: bool) -> JobRequest:
        """Build the denoising job of a request that arrived `seconds` ago."""
        return JobRequest(
            id=job_id,
            task=request.task,
            settings=request.settings,
            seeds=request.seeds,
            adapters=tuple(prompt.options for prompt in request.image_prompts),
            controls=tuple(control.options for control in request.controls),
            frames=request.frames,
            context=request.context,
            timeout=max(request.timeout - seconds, 0.0),
            reports_progress=reports_progress,
        )

    async def _denoise(
        self,
        denoiser: str,
        job: JobRequest,
        tensors: Tensors,
        progress: Callable[[Tensors], None] | None,
        stages: Stages,
    ) -> np.ndarray:
        tensors = {"job": strings(msgspec.json.encode(job)), **tensors}
        async for response in self._models.stream(denoiser, tensors):
            raise_for_error(response)
            if progress:
                progress(_progress_message(response, job.settings.output_encoding))
            if "latents" in response:
                stages.add_finished(json.loads(response["timings"][0]))
                return response["latents"]
        raise RequestError("the denoiser returned no latents")


def _warnings(texts: set[str]) -> Tensors:
    return {"warnings": strings(*sorted(texts))} if texts else {}


def _progress_message(response: Tensors, encoding: str) -> Tensors:
    """Return the part of a denoiser's response that callers get."""
    message = {name: response[name] for name in ("step", "steps") if name in response}
    return message | ({"preview": file_tensor(response["preview"], encoding)} if "preview" in response else {})


async def _gather(*work: Awaitable[Tensors]) -> list[Tensors]:
    """Await all at the same time; if one fails, cancel the others."""
    tasks = [asyncio.ensure_future(part) for part in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
