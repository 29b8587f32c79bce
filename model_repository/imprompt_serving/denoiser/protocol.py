"""A job as the loop sees it: rows, steps and named tensors. Nothing here says what the tensors mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from imprompt_serving.denoiser.admission import Load
    from imprompt_serving.denoiser.control import PreparedControlNet
    from imprompt_serving.job import JobRequest


class LoopJob(Protocol):
    """What the loop, the batcher and the networks of a step ask of a job; `job.Job` is the one that is served.

    A family whose denoising works otherwise brings another class with these members. A row is one latent sample in one
    guidance branch. A step may be computed by several calls, each of some of its rows.
    """

    started: float | None
    """When the first call took rows of it (monotonic seconds); the loop sets it."""
    last_served_tick: int
    """Tick that last served it, or in which it came; the loop sets it."""

    @property
    def id(self) -> str: ...

    @property
    def request(self) -> JobRequest: ...

    @property
    def arrived(self) -> float:
        """Monotonic seconds."""

    @property
    def deadline(self) -> float | None:
        """Monotonic seconds."""

    @property
    def batch_key(self) -> str:
        """Jobs with equal keys can share a call: their tensors have the same names, and stack after padding."""

    @property
    def pictures(self) -> int: ...

    @property
    def rows(self) -> int:
        """Rows of the current step."""

    @property
    def pending(self) -> int:
        """Rows of the current step that no call has computed yet."""

    @property
    def frames(self) -> int:
        """Frames of a row; 1 for pictures."""

    @property
    def windows(self) -> Sequence[Sequence[int]]:
        """Frames of the windows of the current step; empty for pictures."""

    @property
    def load(self) -> Load:
        """What it still needs of the networks."""

    @property
    def step(self) -> int:
        """Denoising steps done."""

    @property
    def steps(self) -> int:
        """Denoising steps in all."""

    @property
    def done(self) -> bool: ...

    @property
    def latents(self) -> Tensor:
        """The result when it is done."""

    @property
    def predicted(self) -> Tensor | None:
        """The clean latents as the last step predicted them, for jobs that want previews."""

    def model_input(self) -> tuple[Tensor, Tensor]:
        """Latents and timesteps of the current step, a row each."""
        ...

    def conditioning(self) -> Mapping[str, Tensor]:
        """The other inputs of the current step by name; the same object until they change."""
        ...

    def conditioning_rows(self, start: int, stop: int) -> Sequence[int]:
        """Rows of `conditioning` for rows `start` to `stop`."""
        ...

    def controls(self) -> Sequence[PreparedControlNet]:
        """The ControlNets that act in the current step."""
        ...

    def add_output_rows(self, noise_pred: Tensor) -> None:
        """Take the networks' output for the next `len(noise_pred)` pending rows; steps when it was the last."""
        ...
