"""Prepare the UNet inputs of a job besides latents and timestep, with one row for each row of the job."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from imprompt_serving import tensor_names
from imprompt_serving.backends import Engine
from imprompt_serving.denoiser.control import PreparedControlNet, is_active, prepare_controls
from imprompt_serving.denoiser.features import T2IFeatures, prepare_features, sum_features
from imprompt_serving.denoiser.image_prompts import RowLayout, absent_inputs, adapter_inputs, has_regions
from imprompt_serving.families import get_family
from imprompt_serving.gpu import upload
from imprompt_serving.job_request import JobRequest
from imprompt_serving.specs import Adapter, Bundle

CPU = torch.device("cpu")


class Conditioning:
    """The conditioning of one job, on `device`. An adapter has no effect before its start or after its end."""

    def __init__(
        self,
        request: JobRequest,
        bundle: Bundle,
        inputs: dict[str, Tensor],
        pictures: int,
        controls: tuple[PreparedControlNet, ...] = (),
        features: tuple[T2IFeatures, ...] = (),
        device: torch.device = CPU,
    ) -> None:
        self._bundle, self._device = bundle, device
        self._features = tuple(part.to(device) for part in features)
        self._size = latent_size(request, bundle)
        self.pictures = pictures
        self.controls = controls
        self._inputs = {name: upload(tensor, device) for name, tensor in inputs.items()}
        self._windows = {
            tensor_names.ip_scale(u.name): (u.start, u.end) for u in request.adapters if (u.start, u.end) != (0, 1)
        }
        self._variants: dict[tuple[bool, ...], dict[str, Tensor]] = {}

    @property
    def regions(self) -> bool:
        """Whether some adapter has several groups of image tokens, each with a mask."""
        return has_regions(self._bundle, self._inputs)

    @property
    def text_tokens(self) -> int:
        """The length of the text embeddings."""
        return self._inputs["encoder_hidden_states"].shape[1]

    def at(self, index: int, count: int) -> Mapping[str, Tensor]:
        """Return the UNet inputs of call `index` of `count`: the same object while they do not change."""
        adapters_on = tuple(is_active(*window, index, count) for window in self._windows.values())
        features_on = tuple(is_active(part.start, part.end, index, count) for part in self._features)
        variant = (*adapters_on, *features_on)
        if variant not in self._variants:
            scales = zip(self._windows, adapters_on, strict=True)
            off = {name: torch.zeros_like(self._inputs[name]) for name, on in scales if not on}
            active = [part for part, on in zip(self._features, features_on, strict=True) if on]
            rows = len(self._inputs["encoder_hidden_states"])
            features = sum_features(self._bundle, active, rows, self._size, self._device)
            self._variants[variant] = {**self._inputs, **off, **features}
        return self._variants[variant]


class Conditioner:
    """Prepares the `Conditioning` of each request.

    Projects image embeddings to tokens, and embeds control images, once per request.
    """

    def __init__(
        self,
        bundle: Bundle,
        projections: Mapping[str, Engine],
        control_embeddings: Mapping[str, Engine] | None = None,
        t2i_adapters: Mapping[str, Engine] | None = None,
        device: torch.device = CPU,
    ) -> None:
        self._bundle, self._projections, self._device = bundle, projections, device
        self._control_embeddings, self._t2i_adapters = control_embeddings or {}, t2i_adapters or {}

    def __call__(self, request: JobRequest, tensors: Mapping[str, Tensor]) -> Conditioning:
        """Return the conditioning of `request`, from its text and image embeddings."""
        bundle = self._bundle
        prefixes = (tensor_names.NEGATIVE, "") if bundle.guided(request) else ("",)
        pictures = len(tensors["prompt_embeds"]) * request.settings.num_images_per_prompt

        def by_picture(name: str) -> Tensor:
            branches = [tensors[f"{prefix}{name}"] for prefix in prefixes]
            return torch.cat([b.repeat_interleave(request.settings.num_images_per_prompt, dim=0) for b in branches])

        guided = len(prefixes) == 2
        inputs = get_family(bundle.family).text_inputs(request, by_picture, pictures=pictures, guided=guided)
        layout = RowLayout(
            branches=len(prefixes),
            prompts=len(tensors["prompt_embeds"]),
            results=request.settings.num_images_per_prompt,
            frames=request.frames,
            size=latent_size(request, bundle),
        )
        inputs |= self._image_prompts(request, tensors, prefixes, layout)
        if bundle.time_cond_proj_dim is not None:
            embedding = guidance_embedding(request.settings.guidance_scale, bundle.time_cond_proj_dim)
            embedded = embedding if bundle.embeds_guidance(request) else torch.zeros_like(embedding)
            inputs["timestep_cond"] = embedded.repeat(len(prefixes) * pictures, 1)
        sizes = {"pictures": pictures, "branches": len(prefixes)}
        controls = prepare_controls(bundle, self._control_embeddings, request, tensors, **sizes)
        controls = tuple(control.to(self._device) for control in controls)
        features = prepare_features(bundle, self._t2i_adapters, request, tensors, **sizes)
        return Conditioning(request, bundle, inputs, pictures, controls, features, self._device)

    def _image_prompts(
        self, request: JobRequest, tensors: Mapping[str, Tensor], prefixes: tuple[str, ...], layout: RowLayout
    ) -> dict[str, Tensor]:
        used = {use.name: use for use in request.adapters}
        inputs: dict[str, Tensor] = {}
        for adapter in self._bundle.adapters:
            name = adapter.name
            if name not in used:
                inputs |= absent_inputs(self._bundle, name, tensors["prompt_embeds"].shape[-1], layout)
                continue
            tokens = [self._tokens(adapter, tensors, prefix) for prefix in prefixes]
            masks = tensors.get(tensor_names.adapter_masks(name))
            inputs |= adapter_inputs(self._bundle, used[name], tokens, layout, masks)
        return inputs

    def _tokens(self, adapter: Adapter, tensors: Mapping[str, Tensor], prefix: str) -> Tensor:
        """Project the embeddings of all pictures to tokens, at most `max_images` pictures in one call."""
        embeds = {"image_embeds": tensors[prefix + tensor_names.image_embeds(adapter.name)].numpy()}
        if adapter.clip_shape is not None:
            embeds["clip_embeds"] = tensors[prefix + tensor_names.clip_embeds(adapter.name)].numpy()
        engine, most = self._projections[adapter.name], self._bundle.max_images
        parts = [
            engine.run({name: value[first : first + most] for name, value in embeds.items()})["tokens"]
            for first in range(0, len(embeds["image_embeds"]), most)
        ]
        return torch.from_numpy(np.concatenate(parts))


def latent_size(request: JobRequest, bundle: Bundle) -> tuple[int, int]:
    """Return the height and width of the latents."""
    height, width = request.settings.height, request.settings.width
    return height // bundle.vae_scale_factor, width // bundle.vae_scale_factor


def guidance_embedding(guidance_scale: float, size: int) -> Tensor:
    """Embed the guidance scale for distilled UNets [1, size] (diffusers' `get_guidance_scale_embedding`)."""
    half = size // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000.0) / (half - 1)))
    angles = torch.tensor([[guidance_scale - 1]], dtype=torch.float32) * 1000.0 * frequencies[None]
    embedding = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
    return torch.nn.functional.pad(embedding, (0, size % 2))
