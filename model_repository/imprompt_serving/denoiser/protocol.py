"""A job as the loop sees it: rows, steps, and named tensors, whose meaning the loop does not know."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from imprompt_serving.denoiser.admission import Load
    from imprompt_serving.denoiser.control import PreparedControlNet
    from imprompt_serving.denoiser.windows import Window
    from imprompt_serving.job_request import JobRequest


class RowBlock(NamedTuple):
    """Consecutive rows of a job within one guidance branch and one window."""

    conditioning: range
    """Their rows of `LoopJob.conditioning`."""
    pictures: range
    """Their pictures."""
    window: Window | None
    """Their frames, for clips that run in windows."""


class LoopJob(Protocol):
    """What the loop, the batcher, and the networks need from a job. `job.Job` implements it.

    A family with a different way of denoising adds another class with these members. A row is one latent sample in one
    guidance branch. Several calls may compute a step, each some of its rows.
    """

    started: float | None
    """When the first call took rows of it, in monotonic seconds. Set by the loop."""
    last_served_tick: int
    """The tick that last served it, or in which it arrived. Set by the loop."""

    @property
    def id(self) -> str: ...

    @property
    def request(self) -> JobRequest: ...

    @property
    def arrived(self) -> float:
        """When it arrived, in monotonic seconds."""

    @property
    def deadline(self) -> float | None:
        """When its time is up, in monotonic seconds; None without a limit."""

    @property
    def batch_key(self) -> str:
        """Jobs with equal keys can share a call: their tensors have the same names and can be stacked after padding."""

    @property
    def loras(self) -> tuple[str, ...]:
        """The LoRAs and scales that it runs with."""

    @property
    def rows(self) -> int:
        """Rows of the current step."""

    @property
    def pending(self) -> int:
        """Rows of the current step that no call has computed yet."""

    @property
    def frames(self) -> int:
        """Frames per row; 1 for pictures."""

    @property
    def load(self) -> Load:
        """The work that it still needs from the networks."""

    @property
    def step(self) -> int:
        """The number of finished denoising steps."""

    @property
    def steps(self) -> int:
        """The total number of denoising steps."""

    @property
    def done(self) -> bool: ...

    @property
    def predicted(self) -> Tensor | None:
        """The clean latents that the last step predicted, for jobs that want previews."""

    def model_input(self) -> tuple[Tensor, Tensor]:
        """Return the latents and timesteps of the current step, one per row."""
        ...

    def conditioning(self) -> Mapping[str, Tensor]:
        """Return the other inputs of the current step by name: the same object until they change."""
        ...

    def blocks(self, start: int, stop: int) -> Iterable[RowBlock]:
        """Split rows `start` to `stop` of the current step where a guidance branch or a window ends."""
        ...

    def controls(self) -> Iterable[PreparedControlNet]:
        """Return the ControlNets that are active in the current step."""
        ...

    def add_output_rows(self, noise_pred: Tensor) -> None:
        """Add the output for the next `len(noise_pred)` pending rows. Once no rows are pending, take the step."""
        ...

    def result(self) -> Tensor:
        """Copy the final latents to the CPU. The device must have finished computing them.

        Raises:
            RequestError: they are infinite or NaN.
        """
        ...
