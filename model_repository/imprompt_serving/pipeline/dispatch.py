"""Choose the denoiser for a job: a bundle has one denoiser per GPU."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from imprompt_serving.errors import Overloaded
from imprompt_serving.job_request import Admission
from imprompt_serving.pipeline.models import Models, raise_for_error, strings
from imprompt_serving.specs import Bundle


class Dispatcher:
    """Sends each job to the denoiser with the fewest outstanding rows.

    It counts only rows of its own process: the unary and the streaming pipeline count separately. If the queue of a
    denoiser is full, it tries the next one.
    """

    def __init__(self, bundle: Bundle, models: Models) -> None:
        self._models = models
        self._rows = dict.fromkeys(bundle.denoisers, 0)

    async def admit(self, admission: Admission) -> str:
        """Reserve a place in a denoiser's queue, before any other work is done for the request.

        Returns:
            The Triton model of the denoiser.

        Raises:
            Overloaded: all queues are full.
        """
        refusal: Overloaded | None = None
        for model in sorted(self._rows, key=self._rows.__getitem__):
            self._rows[model] += admission.rows  # before awaiting, so that concurrent requests see these rows
            try:
                await self._send(model, admit=msgspec.json.encode(admission))
                return model
            except BaseException as error:
                self._rows[model] -= admission.rows
                if not isinstance(error, Overloaded):
                    await self._send(model, cancel=admission.id)
                    raise
                refusal = error
        assert refusal is not None  # every bundle has a denoiser
        raise refusal

    @asynccontextmanager
    async def reservation(self, model: str, admission: Admission) -> AsyncIterator[None]:
        """Hold the place that `model` reserved while the job is prepared and runs; cancel the job if that fails."""
        try:
            yield
        except Overloaded:
            raise
        except BaseException:
            await self._send(model, cancel=admission.id)
            raise
        finally:
            self._rows[model] -= admission.rows

    async def _send(self, model: str, **message: str | bytes) -> None:
        tensors = {name: strings(value) for name, value in message.items()}
        async for response in self._models.stream(model, tensors):
            raise_for_error(response)
