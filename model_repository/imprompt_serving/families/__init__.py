"""Model families: what sets the checkpoints of one family apart when they are served. One light module each.

Methods that make tensors import torch themselves: the pipeline asks for defaults and names, and runs without it.
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

NAMES = ("sd15", "sdxl")
"""The values of `family` in `bundle.json`, and the module of each: of this package, and of `imprompt_export.families`.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family(ABC):
    """What the pipeline and the denoiser ask of a family: defaults, text conditioning, latents, attention layers.

    Defaults are those of diffusers' pipelines; `controlled` tells whether a request uses ControlNets or T2I-Adapters.
    """

    prompts: tuple[str, ...]
    """Request parameters that hold the prompt of each text encoder; the first is required, and stands in for others."""
    parameters: tuple[str, ...] = ()
    """Rows of `parameters.Group.FAMILY` that its requests take."""

    @abstractmethod
    def default_guidance_scale(self, task: Task, *, controlled: bool) -> float: ...

    @abstractmethod
    def default_strength(self, task: Task, *, controlled: bool) -> float: ...

    @abstractmethod
    def default_conditioning_scale(self, task: Task) -> float:
        """Of a ControlNet; clips have 1 in every family."""

    @abstractmethod
    def text_shapes(self, bundle: Bundle) -> dict[str, tuple[int, ...]]:
        """The text embeddings of one branch, which the pipeline sends to the denoiser: shapes for one prompt."""

    @abstractmethod
    def join_text(self, answers: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Make these embeddings from the answers of the text encoders."""

    @abstractmethod
    def text_inputs(
        self, request: GuidanceInputs, embeds: Callable[[str], Tensor], *, pictures: int, guided: bool
    ) -> dict[str, Tensor]:
        """Text as inputs of the denoising network, a row for each row of the job.

        Args:
            embeds: gives the rows of an embedding by its name in `text_shapes`.
            guided: whether the rows of an unconditional branch come first.
        """

    @abstractmethod
    def scale_latents(self, latents: Tensor, bundle: Bundle) -> Tensor:
        """Latents of the VAE as the denoising network knows them."""

    @abstractmethod
    def scheduler_corrections(self, config: Mapping[str, Any], request: GuidanceInputs) -> dict[str, Any]:
        """What diffusers' pipeline for `request` changes in an outdated scheduler configuration."""

    @abstractmethod
    def layer_roles(self, layers: Sequence[CrossAttention]) -> dict[str, frozenset[str]]:
        """Names of the cross-attention layers that carry `style` and `composition` (InstantStyle)."""


def get_family(name: str) -> Family:
    """The family called `name`, one of `NAMES`."""
    found: Family = import_module(f"{__name__}.{name}").FAMILY
    return found
