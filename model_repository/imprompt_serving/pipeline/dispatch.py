"""Which denoiser a job goes to: a bundle has one for each of its GPUs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from imprompt_serving.errors import Overloaded
from imprompt_serving.job_request import Admission
from imprompt_serving.pipeline.models import Models, raise_for_error, strings
from imprompt_serving.specs import Bundle


class Dispatcher:
    """Gives jobs to the denoisers, the one with the fewest outstanding rows first.

    The rows are those of this process: the unary and the streaming pipeline count apart. A denoiser whose line is full
    says so, and the next one is asked.
    """

    def __init__(self, bundle: Bundle, models: Models) -> None:
        self._models = models
        self._rows = dict.fromkeys(bundle.denoisers, 0)

    async def admit(self, asked: Admission) -> str:
        """A place in a line, before any other work is done for a request that is refused then; the denoiser's model.

        Raises:
            Overloaded: all lines are full.
        """
        refused: Overloaded | None = None
        for model in sorted(self._rows, key=self._rows.__getitem__):
            self._rows[model] += asked.rows  # at once, for those that choose while this one waits
            try:
                await self._tell(model, admit=msgspec.json.encode(asked))
                return model
            except BaseException as error:
                self._rows[model] -= asked.rows
                if not isinstance(error, Overloaded):
                    await self._tell(model, cancel=asked.id)
                    raise
                refused = error
        assert refused is not None  # there is a denoiser
        raise refused

    @asynccontextmanager
    async def place(self, model: str, asked: Admission) -> AsyncIterator[None]:
        """While the job ``asked``, admitted to ``model``, is prepared and runs; what breaks it off stops it there."""
        try:
            yield
        except Overloaded:
            raise
        except BaseException:
            await self._tell(model, cancel=asked.id)
            raise
        finally:
            self._rows[model] -= asked.rows

    async def _tell(self, model: str, **message: str | bytes) -> None:
        tensors = {name: strings(value) for name, value in message.items()}
        async for answer in self._models.stream(model, tensors):
            raise_for_error(answer)
