"""The face encoder as a Triton model: an encoded picture in, the embedding of its face out."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from imprompt_serving.errors import RequestError
from imprompt_serving.faces import FaceFinder
from imprompt_serving.specs import Bundle
from imprompt_serving.triton.tensors import arrays, response, texts

logger = logging.getLogger(__name__)


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        folder = Path(args["model_repository"], args["model_version"])
        spec = Bundle.load(folder).face_encoder
        assert spec is not None  # the export writes this model for no other bundle
        self._faces = FaceFinder(folder, spec)

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            return response(self._faces.largest(bytes(arrays(request)["picture"][0])))
        except RequestError as error:  # as a tensor: between two models Triton makes every error an INTERNAL one
            return response({"error": texts(error.status, str(error))})
        except Exception as error:
            logger.exception("a picture was not searched")
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"{type(error).__name__}: {error}"))
