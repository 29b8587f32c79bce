"""The ControlNets of one job: embedded control images, scales, and the steps at which they are active."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from imprompt_serving import tensor_names
from imprompt_serving.backends import Engine
from imprompt_serving.gpu import upload
from imprompt_serving.job_request import ControlOptions, JobRequest
from imprompt_serving.specs import Bundle


def is_active(start: float, end: float, index: int, count: int) -> bool:
    """Return whether call `index` of `count` is within fractions `start` to `end` (diffusers' `controlnet_keep`)."""
    return start <= index / count and (index + 1) / count <= end


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PreparedControlNet:
    """A ControlNet of one job: the inputs of its engine, and when it is active. Instances compare by identity.

    Attributes:
        embedding: the embedded control images [pictures, F, C, h, w]; F is 1 for pictures.
        scale: one number for each residual [R].
        first_row: the first row that it affects: in guess mode, the unconditional branch is left out.
        start: fraction of the steps at which it becomes active.
        end: fraction of the steps at which it stops.
    """

    name: str
    embedding: Tensor
    scale: Tensor
    first_row: int
    start: float
    end: float

    def to(self, device: torch.device) -> PreparedControlNet:
        """Return a copy on `device`."""
        return replace(self, embedding=upload(self.embedding, device), scale=upload(self.scale, device))


def prepare_controls(
    bundle: Bundle,
    embeddings: Mapping[str, Engine],
    request: JobRequest,
    tensors: Mapping[str, Tensor],
    pictures: int,
    branches: int,
) -> tuple[PreparedControlNet, ...]:
    """Embed the control images of `request`, once for all its steps."""
    uses = [use for use in request.controls if use.name in embeddings]
    if not uses:
        return ()
    # As in diffusers, the first ControlNet decides for all of them.
    guess = request.settings.guess_mode or bundle.controlnet(uses[0].name).global_pool
    return tuple(
        PreparedControlNet(
            name=use.name,
            embedding=_embed(
                embeddings[use.name], tensors[tensor_names.control_image(use.name)], request, bundle, pictures
            ),
            scale=_scales(bundle, use, guess),
            first_row=pictures if guess and branches == 2 else 0,
            start=use.start,
            end=use.end,
        )
        for use in uses
    )


def _embed(engine: Engine, images: Tensor, request: JobRequest, bundle: Bundle, pictures: int) -> Tensor:
    """Embed the control images as [pictures, F, C, h, w].

    There is one image for all pictures or one per prompt; for clips, one for all frames or one per frame.
    """
    parts = images.split(bundle.shapes.rows.max)
    features = torch.cat(
        [torch.from_numpy(engine.run({"control_image": p.numpy()})["control_embedding"]) for p in parts]
    )
    if request.frames is not None:
        return features.expand(pictures, request.frames, *features.shape[1:])
    if len(features) == 1:
        return features[None].expand(pictures, *features.shape)
    return features.repeat_interleave(request.settings.num_images_per_prompt, dim=0)[:, None]


def _scales(bundle: Bundle, use: ControlOptions, guess: bool) -> Tensor:
    """Return the scale of each residual [R]; in guess mode it increases from a tenth (`ControlNetModel.forward`)."""
    count = len(bundle.residuals)
    if guess and not bundle.controlnet(use.name).global_pool:
        return torch.logspace(-1, 0, count) * use.scale
    return torch.full((count,), use.scale)
