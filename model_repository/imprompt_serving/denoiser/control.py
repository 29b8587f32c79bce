"""The ControlNets of one job: embedded control images, scales, and the steps at which they act."""

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
    """Whether call ``index`` of ``count`` is among those from ``start`` to ``end`` (diffusers: ``controlnet_keep``)."""
    return start <= index / count and (index + 1) / count <= end


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PreparedControlNet:
    """A ControlNet in one job, as its engine takes it. Equal to itself alone, for it holds tensors.

    Shapes: ``embedding`` [pictures, F, C, h, w] (F is 1 for pictures), ``scale`` [R] (a number for each residual).
    Rows before ``first_row`` are left alone: those of the unconditional branch in guess mode.
    """

    name: str
    embedding: Tensor
    scale: Tensor
    first_row: int
    start: float
    end: float

    def to(self, device: torch.device) -> PreparedControlNet:
        """The same on ``device``."""
        return replace(self, embedding=upload(self.embedding, device), scale=upload(self.scale, device))


def prepare_controls(
    bundle: Bundle,
    embeddings: Mapping[str, Engine],
    request: JobRequest,
    tensors: Mapping[str, Tensor],
    pictures: int,
    branches: int,
) -> tuple[PreparedControlNet, ...]:
    """Embed the control images of ``request``, once for all of its steps."""
    uses = [use for use in request.controls if use.name in embeddings]
    if not uses:
        return ()
    # As in diffusers: the first net decides for all of them.
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
    """Features of the control images [pictures, F, C, h, w].

    One image serves all pictures, or each prompt has its own; clips: one serves all frames, or each has its own.
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
    """The scale of each residual [R]; in guess mode it grows from a tenth (``ControlNetModel.forward``)."""
    count = len(bundle.residuals)
    if guess and not bundle.controlnet(use.name).global_pool:
        return torch.logspace(-1, 0, count) * use.scale
    return torch.full((count,), use.scale)
