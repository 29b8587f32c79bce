"""The denoiser as a decoupled Triton model: a job in, progress and latents out, or the id of a job to cancel."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import triton_python_backend_utils as pb_utils

from imprompt_serving.denoiser.batch import Batcher
from imprompt_serving.denoiser.conditioning import Conditioner
from imprompt_serving.denoiser.job import Job
from imprompt_serving.denoiser.loop import Denoiser, Listener
from imprompt_serving.engines import load_engine
from imprompt_serving.errors import RequestError
from imprompt_serving.job import JobRequest
from imprompt_serving.specs import Bundle
from imprompt_serving.triton.tensors import arrays, failure, response, text

logger = logging.getLogger(__name__)
_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        torch.set_num_threads(1)  # what torch does here is small; the cores belong to the engines
        folder = Path(args["model_repository"], args["model_version"])
        bundle = self._bundle = Bundle.load(folder)

        def engine(name: str) -> Any:
            return load_engine(folder / f"{name}.onnx", bundle.backend)

        projections = {adapter.name: engine(f"image_projection_{adapter.name}") for adapter in bundle.adapters}
        self._conditioner = Conditioner(bundle, projections)
        self._denoiser = Denoiser(engine("unet"), Batcher(bundle), bundle.shapes.rows.max)

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                with torch.no_grad():
                    self._accept(arrays(request), sender)
            except RequestError as error:
                sender.send(failure(error), flags=_FINAL)
            except Exception as error:
                logger.exception("a job was not accepted")
                sender.send(failure(RequestError(f"{type(error).__name__}: {error}")), flags=_FINAL)

    def _accept(self, tensors: dict[str, np.ndarray], sender: Any) -> None:
        if "cancel" in tensors:
            self._denoiser.cancel(tensors["cancel"][0].decode())
            sender.send(flags=_FINAL)
            return
        request = msgspec.json.decode(tensors.pop("job")[0], type=JobRequest)
        conditioning, pictures = self._conditioner(request, {k: torch.from_numpy(v) for k, v in tensors.items()})
        job = Job(request, self._bundle, conditioning, pictures)
        listener = Listener(
            progress=lambda job: sender.send(response(_steps(job))),
            finish=lambda job: sender.send(response(_result(job)), flags=_FINAL),
            fail=lambda error: sender.send(failure(error), flags=_FINAL),
        )
        self._denoiser.submit(job, listener)

    def finalize(self) -> None:
        self._denoiser.stop()


def _steps(job: Job) -> dict[str, np.ndarray]:
    counts = {"step": job.step, "steps": job.request.num_inference_steps}
    return {name: np.array([count], np.int32) for name, count in counts.items()}


def _result(job: Job) -> dict[str, np.ndarray]:
    started = job.started or job.arrived
    timings = {"queue": started - job.arrived, "denoise": time.monotonic() - started}
    return {"latents": job.latents.numpy(), "timings": text(json.dumps(timings)), **_steps(job)}
