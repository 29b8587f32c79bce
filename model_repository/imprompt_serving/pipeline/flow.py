"""The order of engine calls for one request. What calls a model is handed in, so this knows nothing of Triton."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import numpy as np

from imprompt_serving import tensor_names
from imprompt_serving.errors import RequestError
from imprompt_serving.job import Admission, JobRequest, batch_key
from imprompt_serving.pipeline.dispatch import Dispatcher
from imprompt_serving.pipeline.encode import ImagePromptEncoder, TextPromptEncoder, control_tensors, encode_start
from imprompt_serving.pipeline.finish import Finisher
from imprompt_serving.pipeline.models import Models, Tensors, raise_for_error, strings
from imprompt_serving.pipeline.request import Request
from imprompt_serving.pipeline.stages import Stages
from imprompt_serving.specs import Bundle


class Pipeline:
    """Serves the requests of one bundle."""

    def __init__(self, bundle: Bundle, folder: Path, models: Models) -> None:
        self._bundle, self._models = bundle, models
        self._text = TextPromptEncoder(bundle, folder, models)
        self._images = ImagePromptEncoder(bundle, models)
        self._finish = Finisher(bundle, models)
        self._dispatcher = Dispatcher(bundle, models)

    async def generate(
        self, request: Request, job_id: str | None = None, progress: Callable[[Tensors], None] | None = None
    ) -> Tensors:
        """Pictures (or latents, or embeddings) of one request.

        Args:
            job_id: name of the denoising job.
            progress: called with the tensors of a progress answer: steps done, steps in all, previews if asked for.

        Whoever cancels this stops the denoising too.
        """
        if request.encode_image is not None:
            return await self._embeddings_only(request, request.encode_image)
        stages, began, warnings = Stages(), time.perf_counter(), set[str]()
        admission = self._admission(request, job_id or uuid.uuid4().hex)
        with stages.measure("admission"):
            denoiser = await self._dispatcher.admit(admission)
        async with self._dispatcher.place(denoiser, admission):
            parts = await _together(
                self._text.encode(request, stages, warnings),
                self._images.encode(request, stages),
                encode_start(request, self._bundle, self._models, stages),
                control_tensors(request),
            )
            tensors = {name: tensor for part in parts for name, tensor in part.items()}
            job = self._job(request, admission.id, time.perf_counter() - began, reports_progress=progress is not None)
            latents = await self._denoise(denoiser, job, tensors, progress, stages)
        answer = await self._finish(request, latents, stages)
        # The seed of several pictures together repeats them together, and none alone.
        repeatable = len(request.seeds) == request.pictures
        answer["seeds"] = np.array(request.seeds if repeatable else (), np.int64)
        if warnings:
            answer["warnings"] = strings(*sorted(warnings))
        stages.seconds["total"] = time.perf_counter() - began
        answer["timings"] = strings(json.dumps(stages.seconds))
        return answer

    def _admission(self, request: Request, job_id: str) -> Admission:
        """What a request will cost a denoiser."""
        rows = request.pictures * (request.frames or 1) * (2 if self._bundle.guided(request) else 1)
        settings = request.settings
        share = 1.0 if request.task == "text-to-image" else settings.strength
        return Admission(
            id=job_id,
            rows=rows,
            steps=max(round(settings.num_inference_steps * share), 1),
            batch_key=batch_key(self._bundle, settings, request.frames, request.context, regions=request.regions),
        )

    async def _embeddings_only(self, request: Request, adapter: str) -> Tensors:
        prompt = next(prompt for prompt in request.image_prompts if prompt.adapter.name == adapter)
        if prompt.adapter.uses_face:
            return {tensor_names.image_embeds(adapter): await self._images.faces(prompt, Stages())}
        negative, positive = await self._images.features(prompt, True, Stages())
        assert negative is not None  # guided
        return {tensor_names.image_embeds(adapter): np.stack([negative, positive])}

    def _job(self, request: Request, job_id: str, seconds: float, *, reports_progress: bool) -> JobRequest:
        """The denoiser's part of a request that came ``seconds`` ago."""
        return JobRequest(
            id=job_id,
            task=request.task,
            settings=request.settings,
            seeds=request.seeds,
            adapters=tuple(prompt.use for prompt in request.image_prompts),
            controls=tuple(control.use for control in request.controls),
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
        async for answer in self._models.stream(denoiser, tensors):
            raise_for_error(answer)
            if progress:
                progress({name: answer[name] for name in ("step", "steps", "preview") if name in answer})
            if "latents" in answer:
                stages.seconds.update(json.loads(answer["timings"][0]))
                return answer["latents"]
        raise RequestError("the denoiser ended without latents")


async def _together(*work: Awaitable[Tensors]) -> list[Tensors]:
    """The results of all, computed at the same time; when one fails, the others stop."""
    tasks = [asyncio.ensure_future(part) for part in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
