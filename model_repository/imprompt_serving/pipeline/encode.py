"""Encode image prompts, start pictures, and control images before denoising."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from imprompt_serving import tensor_names
from imprompt_serving.errors import InvalidRequest
from imprompt_serving.pipeline.image_prompts import ImagePrompt
from imprompt_serving.pipeline.images import clip_pixels, control_pixels, mask_pixels, vae_pixels
from imprompt_serving.pipeline.mask_crop import crop_region, fit_filled
from imprompt_serving.pipeline.models import Models, Tensors, raise_for_error, strings
from imprompt_serving.pipeline.request import Request
from imprompt_serving.pipeline.stages import Stages
from imprompt_serving.specs import Adapter, Bundle

_CONCURRENT_ENCODES = 4
"""Start pictures (mostly frames) of one request to encode at the same time."""


class ImagePromptEncoder:
    """Encodes image prompts into the embeddings that adapters project to tokens (diffusers' `encode_image`)."""

    def __init__(self, bundle: Bundle, models: Models) -> None:
        self._bundle, self._models = bundle, models
        self._unconditional: dict[str, np.ndarray] = {}

    async def encode(self, request: Request, stages: Stages) -> Tensors:
        """Return the tensors of all adapters that a request uses, including masks."""
        guided = self._bundle.guided(request)
        parts = await asyncio.gather(*(self._prompt(p, guided, stages) for p in request.image_prompts))
        tensors = {name: tensor for part in parts for name, tensor in part.items()}
        for prompt in request.image_prompts:
            if prompt.masks:
                name = tensor_names.adapter_masks(prompt.adapter.name)
                tensors[name] = await asyncio.to_thread(_adapter_masks, prompt, request)
        return tensors

    async def _prompt(self, prompt: ImagePrompt, guided: bool, stages: Stages) -> Tensors:
        name = prompt.adapter.name
        prompt = await self._with_faces(prompt, stages)
        pairs: dict[str, tuple[np.ndarray | None, np.ndarray]] = {}
        if prompt.embeds is not None:
            pairs[tensor_names.image_embeds(name)] = (prompt.embeds[0] if guided else None), prompt.embeds[-1]
        if prompt.images:
            features = await self.features(prompt, guided, stages)
            embeds_name = tensor_names.clip_embeds if prompt.adapter.clip_shape else tensor_names.image_embeds
            pairs[embeds_name(name)] = features
        tensors = {key: positive for key, (_, positive) in pairs.items()}
        return tensors | {tensor_names.NEGATIVE + key: neg for key, (neg, _) in pairs.items() if neg is not None}

    async def faces(self, prompt: ImagePrompt, stages: Stages) -> np.ndarray:
        """Return the face embeddings [2 (negative, positive), faces, 1, 512] of a FaceID adapter's prompt."""
        embeds = (await self._with_faces(prompt, stages)).embeds
        assert embeds is not None  # sent by the caller, or computed above
        return embeds

    async def _with_faces(self, prompt: ImagePrompt, stages: Stages) -> ImagePrompt:
        """Find the faces in the photos of `prompt`, and add their embeddings (negative: zeros) and crops for CLIP.

        The crops stay in insightface's BGR order, as in the diffusers guide and the authors' code.
        """
        if not prompt.photos:
            return prompt
        with stages.measure("face_encoder"):
            faces = await asyncio.gather(*(self._face(prompt, index) for index in range(len(prompt.photos))))
        embeds = np.stack([face["embeddings"] for face in faces])
        crops = tuple(Image.fromarray(face["crops"][0]) for face in faces) if prompt.adapter.clip_shape else ()
        return replace(prompt, embeds=np.stack([np.zeros_like(embeds), embeds]), images=crops)

    async def _face(self, prompt: ImagePrompt, index: int) -> Tensors:
        """Find the largest face of a photo."""
        model = self._bundle.model("face_encoder")
        face = await self._models.call(model, {"picture": strings(prompt.photos[index])})
        raise_for_error(face)
        if not len(face["embeddings"]):
            which = f"picture {index + 1} of {len(prompt.photos)}"
            raise InvalidRequest("ip_adapter_image", f"{prompt.adapter.name}: no face found in {which}")
        return face

    async def features(self, prompt: ImagePrompt, guided: bool, stages: Stages) -> tuple[np.ndarray | None, np.ndarray]:
        """Return the features of a prompt's pictures: negative (if `guided`) and positive, each [pictures, ...]."""
        positive = await self._pictures(prompt.adapter, prompt.images, stages)
        if not guided:
            return None, positive
        if prompt.negative_images:
            return await self._pictures(prompt.adapter, prompt.negative_images, stages), positive
        return await self._default_negative(prompt.adapter, positive), positive

    async def _pictures(self, adapter: Adapter, images: Sequence[Image.Image], stages: Stages) -> np.ndarray:
        encoder = self._bundle.image_encoder(adapter.image_encoder or "")
        with stages.measure("preprocess"):
            pixels = await asyncio.to_thread(lambda: [clip_pixels(image, encoder) for image in images])
        with stages.measure("image_encoder"):
            return np.stack(await asyncio.gather(*(self._picture(adapter, p) for p in pixels)))

    async def _default_negative(self, adapter: Adapter, positive: np.ndarray) -> np.ndarray:
        """Return zeros for the plain adapter, and the encoding of a zero image for the others."""
        if not adapter.uses_hidden_states:
            return np.zeros_like(positive)
        if adapter.name not in self._unconditional:
            size = self._bundle.image_encoder(adapter.image_encoder or "").image_size
            self._unconditional[adapter.name] = await self._picture(adapter, np.zeros((3, size, size), np.float32))
        return np.broadcast_to(self._unconditional[adapter.name], positive.shape)

    async def _picture(self, adapter: Adapter, pixels: np.ndarray) -> np.ndarray:
        """Encode one picture per call, so that Triton's response cache can answer repeated ones."""
        output = "hidden_states" if adapter.uses_hidden_states else "image_embeds"
        model = self._bundle.model(f"image_encoder_{adapter.image_encoder}")
        return (await self._models.call(model, {"pixel_values": pixels[None]}))[output][0]


def _adapter_masks(prompt: ImagePrompt, request: Request) -> np.ndarray:
    """Return masks [masks, height, width] as booleans: a clip may have many, and floats take four times the memory."""
    height, width = request.settings.height, request.settings.width
    return np.concatenate([mask_pixels([mask], height, width)[:, 0] > 0 for mask in prompt.masks])


async def encode_start(request: Request, bundle: Bundle, models: Models, stages: Stages) -> Tensors:
    """Encode start pictures (or frames) as moments of the VAE's Gaussian, and scale masks to the latent size."""
    if request.task == "text-to-image":
        return {}
    if request.image_latents is not None:
        return {"image_latents": request.image_latents}
    semaphore = asyncio.Semaphore(_CONCURRENT_ENCODES)

    async def encode_picture(pixels: np.ndarray) -> np.ndarray:
        async with semaphore:
            return (await models.call(bundle.model("vae_encoder"), {"sample": pixels[None]}))["moments"]

    async def encode(pixels: np.ndarray) -> np.ndarray:
        return np.concatenate(await asyncio.gather(*map(encode_picture, pixels)))

    with stages.measure("vae_encoder"):
        pixels, mask = await asyncio.to_thread(_start_pixels, request)
        if request.task == "image-to-image":
            return {"image_moments": await encode(pixels)}
        whole, masked = await asyncio.gather(encode(pixels), encode(pixels * (mask < 0.5)))
    factor = bundle.vae_scale_factor
    return {"image_moments": whole, "masked_image_moments": masked, "mask": mask[:, :, ::factor, ::factor]}


def _start_pixels(request: Request) -> tuple[np.ndarray, np.ndarray]:
    """Return start pictures [N, 3, height, width] and masks [N, 1, height, width] (N = 0 for image-to-image)."""
    height, width = request.settings.height, request.settings.width
    images, masks = list(request.start.images), list(request.start.masks)
    if request.start.mask_crop is not None:
        box = crop_region(masks[0], width, height, request.start.mask_crop)
        images, masks = ([fit_filled(i.crop(box), width, height) for i in group] for group in (images, masks))
    none = np.zeros((0, 1, height, width), np.float32)
    return vae_pixels(images, height, width), mask_pixels(masks, height, width) if masks else none


async def control_tensors(request: Request) -> Tensors:
    """Return control images at the size of the result, with the same crop as the start picture."""
    return await asyncio.to_thread(_control_tensors, request)


def _control_tensors(request: Request) -> Tensors:
    height, width, crop = request.settings.height, request.settings.width, request.start.mask_crop
    box = None if crop is None else crop_region(request.start.masks[0], width, height, crop)
    tensors = {}
    for control in request.controls:
        images = list(control.images)
        if box is not None:
            images = [fit_filled(image.crop(box), width, height) for image in images]
        tensors[tensor_names.control_image(control.options.name)] = control_pixels(images, height, width, control.mode)
    return tensors
