"""T2I-Adapter features, which the UNet adds inside its blocks: computed once per request, for all active steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from imprompt_serving import tensor_names
from imprompt_serving.backends import Engine
from imprompt_serving.denoiser.precision import DTYPES
from imprompt_serving.gpu import upload
from imprompt_serving.job_request import JobRequest
from imprompt_serving.specs import Bundle, level_size


@dataclass(frozen=True, kw_only=True, slots=True)
class T2IFeatures:
    """The scaled features of one T2I-Adapter, one row for each row of the job; active from `start` to `end`."""

    tensors: dict[str, Tensor]
    start: float
    end: float

    def to(self, device: torch.device) -> T2IFeatures:
        """Return a copy on `device`."""
        return replace(self, tensors={name: upload(tensor, device) for name, tensor in self.tensors.items()})


def prepare_features(
    bundle: Bundle,
    adapters: Mapping[str, Engine],
    request: JobRequest,
    tensors: Mapping[str, Tensor],
    pictures: int,
    branches: int,
) -> tuple[T2IFeatures, ...]:
    """Run the T2I-Adapters of `request`. There is one control image for all pictures, or one per prompt."""
    found, dtype = [], DTYPES[bundle.precision]
    for use in request.controls:
        if use.name not in adapters:
            continue
        images = tensors[tensor_names.control_image(use.name)]
        # Engines that are built for ranges take no more rows at a time.
        parts = [adapters[use.name].run({"control_image": p.numpy()}) for p in images.split(bundle.shapes.rows.max)]
        each = pictures if len(images) == 1 else request.settings.num_images_per_prompt
        scaled = {}
        for name in bundle.feature_names:
            features = torch.cat([torch.from_numpy(part[name]) for part in parts]).to(dtype) * use.scale
            scaled[name] = features.repeat_interleave(each, dim=0).repeat(branches, 1, 1, 1)
        found.append(T2IFeatures(tensors=scaled, start=use.start, end=use.end))
    return tuple(found)


def sum_features(
    bundle: Bundle, features: Sequence[T2IFeatures], rows: int, size: tuple[int, int], device: torch.device
) -> dict[str, Tensor]:
    """Add up `features` as UNet inputs, for latents of `size` (height and width). Return zeros if there are none."""
    inputs = {}
    for name, (channels, level) in zip(bundle.feature_names, bundle.features, strict=True):
        if features:
            first, *others = (part.tensors[name] for part in features)
            inputs[name] = sum(others, start=first)
        else:
            shape = rows, channels, *(level_size(side, level) for side in size)
            inputs[name] = torch.zeros(shape, dtype=DTYPES[bundle.precision], device=device)
    return inputs
