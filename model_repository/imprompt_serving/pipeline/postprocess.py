"""Turn latents into the response: decode, check, and paste back pictures, and encode files."""

from __future__ import annotations

import asyncio

import numpy as np
from PIL import Image

from imprompt_serving.errors import RequestError
from imprompt_serving.parameters import Settings
from imprompt_serving.pipeline.images import clip_pixels
from imprompt_serving.pipeline.mask_crop import crop_region, overlay
from imprompt_serving.pipeline.models import Models, Tensors
from imprompt_serving.pipeline.output_files import file_tensor, picture_file, video_file
from imprompt_serving.pipeline.request import Request
from imprompt_serving.pipeline.stages import Stages
from imprompt_serving.specs import Bundle

_CONCURRENT_DECODES = 2
"""Pictures of one request to decode at the same time."""


class Postprocessor:
    """Turns the latents of a request into the tensors of its response."""

    def __init__(self, bundle: Bundle, models: Models) -> None:
        self._bundle, self._models = bundle, models

    async def __call__(self, request: Request, latents: np.ndarray, stages: Stages) -> Tensors:
        if request.settings.output_type == "latent":
            return {"latents": latents}
        result = await (
            self._videos(latents, stages) if latents.ndim == 5 else self._pictures(request, latents, stages)
        )
        if request.settings.output_format is None:
            return result
        with stages.measure("postprocess"):
            return await asyncio.to_thread(_encode_files, result, request.settings)

    async def _pictures(self, request: Request, latents: np.ndarray, stages: Stages) -> Tensors:
        with stages.measure("vae_decoder"):
            pictures = await self._decode(latents)
        result: Tensors = {}
        if self._bundle.safety_checker is not None:
            with stages.measure("safety_checker"):
                unsafe = await self._unsafe(pictures)
            pictures[unsafe] = 0
            result["nsfw_content_detected"] = unsafe
        if request.start.mask_crop is not None:
            with stages.measure("postprocess"):
                pictures = await asyncio.to_thread(_paste_back, request, pictures)
        return result | {"images": pictures}

    async def _videos(self, latents: np.ndarray, stages: Stages) -> Tensors:
        """Decode latents [N, C, F, h, w] into frames. One unsafe frame blacks out the whole clip."""
        clips, _, frames = latents.shape[:3]
        with stages.measure("vae_decoder"):
            pictures = await self._decode(np.concatenate(latents.swapaxes(1, 2)))
        video = pictures.reshape(clips, frames, *pictures.shape[1:])
        if self._bundle.safety_checker is None:
            return {"frames": video}
        with stages.measure("safety_checker"):
            unsafe = (await self._unsafe(pictures)).reshape(clips, frames).any(axis=1)
        video[unsafe] = 0
        return {"frames": video, "nsfw_content_detected": unsafe}

    async def _decode(self, latents: np.ndarray) -> np.ndarray:
        """Decode latents into uint8 pictures, one per call, to bound memory and let other requests in between.

        Few calls run at a time, because calls in flight continue when the request is canceled.
        """
        model, semaphore = self._bundle.model("vae_decoder"), asyncio.Semaphore(_CONCURRENT_DECODES)

        async def decode(sample: np.ndarray) -> np.ndarray:
            async with semaphore:
                response = await self._models.call(model, {"latents": sample[None]})
            if not response["finite"].all():
                raise RequestError("the VAE decoder produced pixels that are not finite")
            return response["images"]

        return np.concatenate(await asyncio.gather(*map(decode, latents)))

    async def _unsafe(self, pictures: np.ndarray) -> np.ndarray:
        """Return whether each picture is unsafe [N]."""
        encoder, model = self._bundle.safety_checker, self._bundle.model("safety_checker")
        assert encoder is not None
        pixels = await asyncio.to_thread(lambda: [clip_pixels(Image.fromarray(p), encoder) for p in pictures])
        parts = await asyncio.gather(*(self._models.call(model, {"pixel_values": p[None]}) for p in pixels))
        return np.concatenate([part["nsfw"] for part in parts])[:, 0]


def _encode_files(result: Tensors, settings: Settings) -> Tensors:
    """Replace the pictures or clips of a result by files."""
    encode, items = (video_file, result.pop("frames")) if "frames" in result else (picture_file, result.pop("images"))
    files = (encode(item, settings.output_format or "") for item in items)
    return result | {"encoded": file_tensor(files, settings.output_encoding)}


def _paste_back(request: Request, pictures: np.ndarray) -> np.ndarray:
    image, mask = request.start.images[0], request.start.masks[0]
    box = crop_region(mask, request.settings.width, request.settings.height, request.start.mask_crop or 0)
    return np.stack([np.asarray(overlay(mask, image, Image.fromarray(picture), box)) for picture in pictures])
