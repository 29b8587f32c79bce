"""The order of engine calls for one request. What calls a model is handed in, so this knows nothing of Triton."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from imprompt_serving.errors import InvalidRequest, RequestError, from_status
from imprompt_serving.job import JobRequest
from imprompt_serving.pipeline.encode import ImagePromptEncoder, TextPromptEncoder, control_tensors, encode_start
from imprompt_serving.pipeline.finish import Finisher
from imprompt_serving.pipeline.models import Models, Tensors, strings
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

    async def generate(
        self, request: Request, job_id: str | None = None, progress: Callable[[int, int], None] | None = None
    ) -> Tensors:
        """Pictures (or latents, or embeddings) of one request.

        Args:
            job_id: name of the denoising job, for ``cancel``.
            progress: called with the steps done and the steps in all.
        """
        if request.encode_image is not None:
            return await self._embeddings_only(request, request.encode_image)
        stages, began = Stages(), time.perf_counter()
        text, embeds, start = await asyncio.gather(
            self._text.encode(request, stages),
            self._images.encode(request, stages),
            encode_start(request, self._bundle, self._models, stages),
        )
        tensors = {**text, **embeds, **start, **control_tensors(request)}
        latents = await self._denoise(request, tensors, job_id or uuid.uuid4().hex, progress, stages)
        answer = await self._finish(request, latents, stages)
        per_picture = len(request.seeds) == request.pictures
        answer["seeds"] = np.array(request.seeds * (1 if per_picture else request.pictures), np.int64)
        stages.seconds["total"] = time.perf_counter() - began
        answer["timings"] = strings(json.dumps(stages.seconds))
        return answer

    async def cancel(self, job_id: str) -> None:
        """Stop the denoising of ``job_id``, if it is still going on."""
        async for _ in self._models.stream(self._bundle.model("denoiser"), {"cancel": strings(job_id)}):
            pass

    async def _embeddings_only(self, request: Request, adapter: str) -> Tensors:
        for prompt in request.image_prompts:
            if prompt.adapter.name == adapter:
                negative, positive = await self._images.features(prompt, True, Stages())
                assert negative is not None  # guided
                return {f"image_embeds_{adapter}": np.stack([negative, positive])}
        raise InvalidRequest("ip_adapter_image", f"no picture for adapter {adapter}")

    async def _denoise(
        self,
        request: Request,
        tensors: Tensors,
        job_id: str,
        progress: Callable[[int, int], None] | None,
        stages: Stages,
    ) -> np.ndarray:
        job = JobRequest(
            id=job_id,
            task=request.task,
            height=request.height,
            width=request.width,
            num_inference_steps=request.num_inference_steps,
            num_images_per_prompt=request.num_images_per_prompt,
            guidance_scale=request.guidance_scale,
            guidance_rescale=request.guidance_rescale,
            eta=request.eta,
            strength=request.strength,
            seeds=request.seeds,
            scheduler=request.scheduler,
            scheduler_config=request.scheduler_config,
            adapters=tuple(prompt.use for prompt in request.image_prompts),
            controls=tuple(control.use for control in request.controls),
            guess_mode=request.guess_mode,
            sizes=request.sizes,
            timeout=request.timeout,
            progress_every=request.progress_every if progress else 0,
        )
        tensors = {"job": strings(msgspec.json.encode(job)), **tensors}
        with stages.measure("denoiser"):
            async for answer in self._models.stream(self._bundle.model("denoiser"), tensors):
                if "error" in answer:
                    status, message = (part.decode() for part in answer["error"])
                    raise from_status(status, message)
                if progress:
                    progress(int(answer["step"][0]), int(answer["steps"][0]))
                if "latents" in answer:
                    stages.seconds.update(json.loads(answer["timings"][0]))
                    return answer["latents"]
        raise RequestError("the denoiser ended without latents")
