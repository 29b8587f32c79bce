"""The face encoder as a Triton model: encoded picture in, face embedding out."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from imprompt_serving.errors import RequestError, unexpected
from imprompt_serving.faces import FaceFinder
from imprompt_serving.heartbeat import Heart
from imprompt_serving.specs import Bundle
from imprompt_serving.triton.internal import warn_if_open, without_secret
from imprompt_serving.triton.tensors import arrays, failure, response, texts

logger = logging.getLogger(__name__)


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self._heart = Heart(args["model_instance_name"])
        folder = Path(args["model_repository"], args["model_version"])
        spec = Bundle.load(folder).face_encoder
        assert spec is not None  # the export writes this model only for bundles with a face encoder
        self._faces = FaceFinder(folder, spec)
        self._name = args["model_name"]
        warn_if_open(self._name)
        self._heart.loaded()

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            picture = without_secret(arrays(request), self._name)["picture"][0]
            return response(self._faces.largest(bytes(picture)))
        except RequestError as error:  # as a tensor: Triton turns every error between models into INTERNAL
            return response({"error": texts(error.label, str(error))})
        except Exception as error:
            logger.exception("face detection failed")
            return failure(unexpected(error))
