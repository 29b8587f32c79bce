"""The order of engine calls for one request. What calls a model is handed in, so this knows nothing of Triton."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np

from imprompt_serving.errors import InvalidRequest, RequestError
from imprompt_serving.job import AdapterUse, JobRequest
from imprompt_serving.pipeline.images import clip_pixels
from imprompt_serving.pipeline.request import ImagePrompt, Request
from imprompt_serving.pipeline.text import PromptTokenizer
from imprompt_serving.specs import Adapter, Bundle

Tensors = dict[str, np.ndarray]


class Models(Protocol):
    """How the pipeline reaches the other models."""

    async def call(self, model: str, tensors: Mapping[str, np.ndarray], outputs: list[str]) -> Tensors:
        """One answer of an engine."""
        ...

    def stream(self, model: str, tensors: Mapping[str, np.ndarray], outputs: list[str]) -> AsyncIterator[Tensors]:
        """The answers of a decoupled model."""
        ...


@dataclass(slots=True)
class Stages:
    """Seconds by stage; stages may overlap."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, stage: str):  # type: ignore[no-untyped-def]
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


class Pipeline:
    """Serves the requests of one bundle."""

    def __init__(self, bundle: Bundle, folder: Path, models: Models) -> None:
        self._bundle, self._models = bundle, models
        self._tokenizers = [PromptTokenizer(folder, encoder) for encoder in bundle.text_encoders]
        self._unconditional: dict[str, np.ndarray] = {}

    async def generate(
        self, request: Request, job_id: str | None = None, progress: Callable[[int, int], None] | None = None
    ) -> Tensors:
        """Pictures (or latents, or embeddings) of one request.

        Args:
            job_id: name of the denoising job, for ``cancel``.
            progress: called with the steps done and the steps in all.
        """
        stages, start = Stages(), time.perf_counter()
        if request.encode_image is not None:
            return await self._embeddings_only(request)
        text, embeds = await asyncio.gather(self._encode_text(request, stages), self._encode_images(request, stages))
        latents = await self._denoise(request, {**text, **embeds}, job_id or uuid.uuid4().hex, progress, stages)
        answer: Tensors = {"seeds": np.array(self._seeds(request), np.int64)}
        if request.output_type == "latent":
            answer["latents"] = latents
        else:
            with stages.measure("vae_decoder"):
                answer["images"] = await self._decode(latents)
        stages.seconds["total"] = time.perf_counter() - start
        answer["timings"] = np.array([json.dumps(stages.seconds).encode()], dtype=object)
        return answer

    async def cancel(self, job_id: str) -> None:
        """Stop the denoising of ``job_id``, if it is still going on."""
        async for _ in self._models.stream(self._bundle.model("denoiser"), {"cancel": _text(job_id)}, []):
            pass

    async def _encode_text(self, request: Request, stages: Stages) -> Tensors:
        guided = request.guidance_scale > 1
        prompts = [*request.prompt, *(request.negative_prompt if guided else ())]
        skip = np.array([[request.clip_skip]], np.int64)
        encoder, tokenizer = self._bundle.text_encoders[0], self._tokenizers[0]

        async def encode(prompt: str) -> np.ndarray:
            tensors = {"input_ids": tokenizer(prompt), "clip_skip": skip}
            return (await self._models.call(self._bundle.model(encoder.engine), tensors, ["hidden_states"]))[
                "hidden_states"
            ]

        with stages.measure("text_encoder"):
            unique = list(dict.fromkeys(prompts))
            by_prompt = dict(zip(unique, await asyncio.gather(*map(encode, unique)), strict=True))
        embeds = {"prompt_embeds": np.concatenate([by_prompt[prompt] for prompt in request.prompt])}
        if guided:
            embeds["negative_prompt_embeds"] = np.concatenate([by_prompt[prompt] for prompt in request.negative_prompt])
        return embeds

    async def _encode_images(self, request: Request, stages: Stages) -> Tensors:
        async def encode(prompt: ImagePrompt) -> Tensors:
            name = prompt.adapter.name
            negative, positive = await self._embeds(prompt, request.guidance_scale > 1, stages)
            tensors = {f"image_embeds_{name}": positive}
            return tensors if negative is None else {**tensors, f"negative_image_embeds_{name}": negative}

        parts = await asyncio.gather(*map(encode, request.image_prompts))
        return {name: tensor for part in parts for name, tensor in part.items()}

    async def _embeds(
        self, prompt: ImagePrompt, guided: bool, stages: Stages
    ) -> tuple[np.ndarray | None, np.ndarray]:
        """Negative (when ``guided``) and positive embeddings of an image prompt, each [pictures, ...]."""
        if prompt.embeds is not None:
            if guided and len(prompt.embeds) == 1:
                raise InvalidRequest(
                    "ip_adapter_image_embeds", "with guidance the first axis holds negative and positive embeddings"
                )
            return (prompt.embeds[0] if guided else None), prompt.embeds[-1]
        encoder = self._bundle.image_encoder(prompt.adapter.image_encoder or "")
        with stages.measure("preprocess"):
            pixels = [clip_pixels(image, encoder) for image in prompt.images]
        with stages.measure("image_encoder"):
            positive = np.stack(await asyncio.gather(*(self._encode_image(prompt.adapter, p) for p in pixels)))
            negative = await self._unconditional_embeds(prompt.adapter, positive) if guided else None
        return negative, positive

    async def _unconditional_embeds(self, adapter: Adapter, positive: np.ndarray) -> np.ndarray:
        """Zeros for the plain adapter, the encoding of a zero image for the others (diffusers' ``encode_image``)."""
        if not adapter.uses_hidden_states:
            return np.zeros_like(positive)
        if adapter.name not in self._unconditional:
            size = self._bundle.image_encoder(adapter.image_encoder or "").image_size
            self._unconditional[adapter.name] = await self._encode_image(adapter, np.zeros((3, size, size), np.float32))
        return np.broadcast_to(self._unconditional[adapter.name], positive.shape)

    async def _encode_image(self, adapter: Adapter, pixels: np.ndarray) -> np.ndarray:
        """One picture's features. A call each: equal pictures are then answered by Triton's response cache."""
        output = "hidden_states" if adapter.uses_hidden_states else "image_embeds"
        model = self._bundle.model(f"image_encoder_{adapter.image_encoder}")
        return (await self._models.call(model, {"pixel_values": pixels[None]}, [output]))[output][0]

    async def _embeddings_only(self, request: Request) -> Tensors:
        for prompt in request.image_prompts:
            if prompt.adapter.name == request.encode_image:
                negative, positive = await self._embeds(prompt, True, Stages())
                return {f"image_embeds_{prompt.adapter.name}": np.stack([negative, positive])}  # type: ignore[list-item]
        raise InvalidRequest("ip_adapter_image", f"no picture for adapter {request.encode_image}")

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
            height=request.height,
            width=request.width,
            num_inference_steps=request.num_inference_steps,
            num_images_per_prompt=request.num_images_per_prompt,
            guidance_scale=request.guidance_scale,
            guidance_rescale=request.guidance_rescale,
            eta=request.eta,
            seeds=request.seeds,
            scheduler=request.scheduler,
            scheduler_config=request.scheduler_config,
            adapters=tuple(AdapterUse(name=p.adapter.name, scale=p.scale) for p in request.image_prompts),
            timeout=request.timeout,
            progress_every=request.progress_every if progress else 0,
        )
        tensors = {"job": np.array([msgspec.json.encode(job)], dtype=object), **tensors}
        with stages.measure("denoiser"):
            async for answer in self._models.stream(self._bundle.model("denoiser"), tensors, []):
                if progress:
                    progress(int(answer["step"][0]), int(answer["steps"][0]))
                if "latents" in answer:
                    stages.seconds.update(json.loads(answer["timings"][0]))
                    return answer["latents"]
        raise RequestError("the denoiser ended without latents")

    async def _decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents -> uint8 pictures, a picture a call, so that memory stays bounded and other requests get a turn."""

        async def decode(sample: np.ndarray) -> np.ndarray:
            return (await self._models.call(self._bundle.model("vae_decoder"), {"latents": sample[None]}, ["images"]))[
                "images"
            ]

        return np.concatenate(await asyncio.gather(*map(decode, latents)))

    @staticmethod
    def _seeds(request: Request) -> list[int]:
        return list(request.seeds) * (request.pictures if request.one_generator else 1)


def _text(value: str) -> np.ndarray:
    return np.array([value.encode()], dtype=object)
