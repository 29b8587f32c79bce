"""Model families: what serving needs to know about the checkpoints of a family, in one light module each.

Methods that make tensors import torch themselves, because the pipeline, which needs defaults and names, runs without
it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from imprompt_serving.job_request import Task
    from imprompt_serving.specs import Bundle, CrossAttention, GuidanceInputs

NAMES = ("sd15", "sdxl", "sdxl_refiner")
"""Values of `family` in `bundle.json`; each is also a module here and in `imprompt_export.families`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family(ABC):
    """A family as the pipeline and the denoiser see it: defaults, text conditioning, latents, attention layers.

    Defaults are those of diffusers' pipelines; `controlled` says whether a request uses ControlNets or T2I-Adapters.
    """

    prompts: tuple[str, ...]
    """The prompt parameter of each text encoder. The first is required, and is the default for the others."""
    parameters: tuple[str, ...] = ()
    """Names of the `parameters.Group.FAMILY` rows that requests accept."""
    needs_image: bool = False
    """Whether it only changes pictures (or latents), and cannot start from noise alone."""

    @abstractmethod
    def default_guidance_scale(self, task: Task, *, controlled: bool) -> float:
        """Return the default `guidance_scale`."""

    @abstractmethod
    def default_strength(self, task: Task, *, controlled: bool) -> float:
        """Return the default `strength`."""

    @abstractmethod
    def default_conditioning_scale(self, task: Task) -> float:
        """Return the default `controlnet_conditioning_scale` for pictures; for clips it is 1 in every family."""

    @abstractmethod
    def text_shapes(self, bundle: Bundle) -> dict[str, tuple[int, ...]]:
        """Return the shapes, for one prompt, of the text embeddings that the pipeline sends for each branch."""

    @abstractmethod
    def join_text(self, outputs: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Build the embeddings of `text_shapes` from the outputs of the text encoders."""

    @abstractmethod
    def text_inputs(
        self, request: GuidanceInputs, embeds: Callable[[str], Tensor], *, pictures: int, guided: bool
    ) -> dict[str, Tensor]:
        """Build the text inputs of the denoising network, with one row per row of the job.

        Args:
            embeds: returns the rows of an embedding by its name in `text_shapes`.
            guided: whether the job starts with the rows of an unconditional branch.
        """

    @abstractmethod
    def scale_latents(self, latents: Tensor, bundle: Bundle) -> Tensor:
        """Scale latents of the VAE to those of the denoising network."""

    @abstractmethod
    def scheduler_corrections(self, config: Mapping[str, Any], request: GuidanceInputs) -> dict[str, Any]:
        """Return what diffusers' pipeline for `request` corrects in an outdated scheduler configuration."""

    @abstractmethod
    def layer_roles(self, layers: Sequence[CrossAttention]) -> dict[str, frozenset[str]]:
        """Name the cross-attention layers that carry `style` and `composition` (InstantStyle)."""


def get_family(name: str) -> Family:
    """Load the family `name`, one of `NAMES`."""
    family: Family = import_module(f"{__name__}.{name}").FAMILY
    return family
