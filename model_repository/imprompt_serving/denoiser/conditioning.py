"""Request -> UNet conditioning of a job, with a row for each row of the job."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from imprompt_serving.denoiser.image_prompts import absent_inputs, adapter_inputs, layer_scales
from imprompt_serving.engines import Engine
from imprompt_serving.errors import InvalidRequest
from imprompt_serving.job import JobRequest
from imprompt_serving.specs import Bundle


class Conditioner:
    """Projects image embeddings to tokens, once a request, and lays out what the UNet takes beside the latents."""

    def __init__(self, bundle: Bundle, projections: Mapping[str, Engine]) -> None:
        self._bundle, self._projections = bundle, projections

    def __call__(self, request: JobRequest, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        """UNet inputs with one row for each latent sample and guidance branch, and the number of pictures."""
        guided = request.guidance_scale > 1
        prompts = tensors["prompt_embeds"]
        pictures = len(prompts) * request.num_images_per_prompt
        texts = [tensors["negative_prompt_embeds"], prompts] if guided else [prompts]
        text = torch.cat([t.repeat_interleave(request.num_images_per_prompt, dim=0) for t in texts])
        branches = self._image_prompts(request, tensors, guided)
        rows = {name: tensor.repeat_interleave(pictures, dim=0) for name, tensor in branches.items()}
        return {"encoder_hidden_states": text, **rows}, pictures

    def _image_prompts(self, request: JobRequest, tensors: Mapping[str, Tensor], guided: bool) -> dict[str, Tensor]:
        bundle = self._bundle
        height, width = (size // bundle.vae_scale_factor for size in (request.height, request.width))
        used = {use.name: use for use in request.adapters}
        inputs: dict[str, Tensor] = {}
        for adapter in bundle.adapters:
            if adapter.name not in used:
                features = tensors["prompt_embeds"].shape[-1]
                inputs |= absent_inputs(bundle, adapter.name, 1 + guided, features, height, width)
                continue
            prefixes = ("negative_", "") if guided else ("",)
            tokens = [self._tokens(adapter.name, tensors[f"{prefix}image_embeds_{adapter.name}"]) for prefix in prefixes]
            count = tokens[-1].shape[0] * tokens[-1].shape[1]
            if count > bundle.shapes.image_tokens[-1]:
                raise InvalidRequest(
                    "ip_adapter_image",
                    f"{len(tokens[-1])} pictures for {adapter.name} make {count} image tokens; "
                    f"at most {bundle.shapes.image_tokens[-1]} are served",
                )
            scale = layer_scales(bundle, used[adapter.name].scale)[None]
            inputs |= adapter_inputs(bundle, adapter.name, tokens, scale, height, width)
        return inputs

    def _tokens(self, adapter: str, embeds: Tensor) -> Tensor:
        return torch.from_numpy(self._projections[adapter].run({"image_embeds": embeds.numpy()})["tokens"])
