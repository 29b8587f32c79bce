"""A job as the loop sees it: rows, steps and named tensors. Nothing here says what the tensors mean."""

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
    """Rows of a job within one guidance branch and one window.

    Their rows of `LoopJob.conditioning`, their pictures, and the frames that they see of a clip that runs in windows.
    """

    conditioning: range
    pictures: range
    window: Window | None


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
    def rows(self) -> int:
        """Rows of the current step."""

    @property
    def pending(self) -> int:
        """Rows of the current step that no call has computed yet."""

    @property
    def frames(self) -> int:
        """Frames of a row; 1 for pictures."""

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
    def predicted(self) -> Tensor | None:
        """The clean latents as the last step predicted them, for jobs that want previews."""

    def model_input(self) -> tuple[Tensor, Tensor]:
        """Latents and timesteps of the current step, a row each."""
        ...

    def conditioning(self) -> Mapping[str, Tensor]:
        """The other inputs of the current step by name; the same object until they change."""
        ...

    def blocks(self, start: int, stop: int) -> Iterable[RowBlock]:
        """Rows `start` to `stop` of the current step, cut where a guidance branch or a window ends."""
        ...

    def controls(self) -> Iterable[PreparedControlNet]:
        """The ControlNets that act in the current step."""
        ...

    def add_output_rows(self, noise_pred: Tensor) -> None:
        """Take the networks' output for the next `len(noise_pred)` pending rows; steps when it was the last."""
        ...

    def result(self) -> Tensor:
        """The latents of a job that the device is done with, on the CPU.

        Raises:
            RequestError: they are not numbers.
        """
        ...
