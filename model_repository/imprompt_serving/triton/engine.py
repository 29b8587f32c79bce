"""An engine as a Triton model, which runs the requests of a dynamic batch in one call."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from imprompt_serving.backends import get_backend
from imprompt_serving.backends.padding import PaddedEngine, warm_up
from imprompt_serving.errors import RequestError, unexpected
from imprompt_serving.heartbeat import Heart
from imprompt_serving.specs import CallRows
from imprompt_serving.triton.internal import warn_if_open, without_secret
from imprompt_serving.triton.tensors import arrays, failure, response

logger = logging.getLogger(__name__)

Tensors = dict[str, np.ndarray]


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self._heart = Heart(args["model_instance_name"])
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        path = Path(args["model_repository"], args["model_version"], "model")
        device = f"cuda:{args['model_instance_device_id']}" if args["model_instance_kind"] == "GPU" else ""
        threads = int(parameters.get("engine_threads", 0))
        backend = get_backend(parameters["engine_backend"])
        rows = CallRows(config["max_batch_size"], backend.buckets_rows(device))
        self._engine = PaddedEngine(backend.load(path, threads=threads, device=device), rows)
        if rows.bucketed:
            dims = json.loads(parameters["engine_usual_dims"])
            types = {value["name"]: pb_utils.triton_string_to_numpy(value["data_type"]) for value in config["input"]}
            warm_up(self._engine, {name: np.zeros((1, *size), types[name]) for name, size in dims.items()}, rows)
        self._name = args["model_name"]
        warn_if_open(self._name)
        self._heart.loaded()

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request with a separate response object: Triton crashes if two requests share one."""
        inputs: dict[int, Tensors] = {}
        outcomes: dict[int, Tensors | RequestError] = {}
        for index, request in enumerate(requests):
            try:
                inputs[index] = without_secret(arrays(request), self._name)
            except Exception as error:
                outcomes[index] = unexpected(error)
        outcomes |= self._run(inputs)
        return [_to_response(outcomes[index]) for index in range(len(requests))]

    def _run(self, inputs: dict[int, Tensors]) -> dict[int, Tensors | RequestError]:
        """Run all inputs as one batch; if that fails, run each one alone, so that only the faulty ones fail."""
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


def _to_response(outcome: Tensors | RequestError) -> Any:
    return failure(outcome) if isinstance(outcome, RequestError) else response(outcome)
