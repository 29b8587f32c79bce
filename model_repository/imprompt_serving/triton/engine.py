"""An engine as a Triton model: requests of one dynamic batch run as one call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from imprompt_serving.engines import load_engine
from imprompt_serving.triton.tensors import arrays, response


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        given = {name: value["string_value"] for name, value in parameters.items()}
        path = Path(args["model_repository"], args["model_version"], "model")
        device = f"cuda:{args['model_instance_device_id']}" if args["model_instance_kind"] == "GPU" else ""
        threads = int(given.get("engine_threads", 0))
        self._engine = load_engine(path, given["engine_backend"], threads=threads, device=device)

    def execute(self, requests: list[Any]) -> list[Any]:
        inputs = [arrays(request) for request in requests]
        rows = [len(next(iter(tensors.values()))) for tensors in inputs]
        try:
            outputs = self._engine.run({name: np.concatenate([t[name] for t in inputs]) for name in inputs[0]})
        except Exception as error:
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))] * len(requests)
        bounds = np.cumsum(rows)[:-1]
        split = {name: np.split(value, bounds) for name, value in outputs.items()}
        return [response({name: parts[i] for name, parts in split.items()}) for i in range(len(requests))]
