"""An engine as a Triton model: requests of one dynamic batch run as one call."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from imprompt_serving.engines import load_engine
from imprompt_serving.errors import RequestError, unexpected
from imprompt_serving.triton.internal import warn_if_open, without_secret
from imprompt_serving.triton.tensors import arrays, failure, response

logger = logging.getLogger(__name__)

Tensors = dict[str, np.ndarray]


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        given = {name: value["string_value"] for name, value in parameters.items()}
        path = Path(args["model_repository"], args["model_version"], "model")
        device = f"cuda:{args['model_instance_device_id']}" if args["model_instance_kind"] == "GPU" else ""
        threads = int(given.get("engine_threads", 0))
        self._engine = load_engine(path, given["engine_backend"], threads=threads, device=device)
        self._name = args["model_name"]
        warn_if_open(self._name)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request with a response object of its own: Triton crashes when two requests share one."""
        inputs: dict[int, Tensors] = {}
        outcomes: dict[int, Tensors | RequestError] = {}
        for index, request in enumerate(requests):
            try:
                inputs[index] = without_secret(arrays(request), self._name)
            except Exception as error:
                outcomes[index] = unexpected(error)
        outcomes |= self._run(inputs)
        return [_answer(outcomes[index]) for index in range(len(requests))]

    def _run(self, inputs: dict[int, Tensors]) -> dict[int, Tensors | RequestError]:
        """Run all inputs as one batch; if that fails, each one alone, so that a bad one harms no neighbor."""
        if not inputs:
            return {}
        try:
            return dict(zip(inputs, self._run_batch(list(inputs.values())), strict=True))
        except Exception as error:
            if len(inputs) == 1:
                logger.exception("%s failed", self._name)
                return dict.fromkeys(inputs, unexpected(error))
        alone = [self._run({index: tensors}) for index, tensors in inputs.items()]
        return {index: outcome for part in alone for index, outcome in part.items()}

    def _run_batch(self, inputs: list[Tensors]) -> list[Tensors]:
        rows = [len(next(iter(tensors.values()))) for tensors in inputs]
        outputs = self._engine.run({name: np.concatenate([t[name] for t in inputs]) for name in inputs[0]})
        split = {name: np.split(value, np.cumsum(rows)[:-1]) for name, value in outputs.items()}
        return [{name: parts[index] for name, parts in split.items()} for index in range(len(inputs))]


def _answer(outcome: Tensors | RequestError) -> Any:
    return failure(outcome) if isinstance(outcome, RequestError) else response(outcome)
