"""The denoiser as a decoupled Triton model: runs and cancels jobs, and responds with progress and latents."""

from __future__ import annotations

import imprompt_serving.triton.lean_diffusers  # noqa: F401  # first: it decides what diffusers imports

# isort: split
import json
import logging
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import msgspec
import numpy as np
import torch
import triton_python_backend_utils as pb_utils

from imprompt_serving import metrics
from imprompt_serving.backends import Engine, get_backend
from imprompt_serving.denoiser.admission import Load
from imprompt_serving.denoiser.answers import Listener
from imprompt_serving.denoiser.assembly import assemble
from imprompt_serving.denoiser.batch import Batcher
from imprompt_serving.denoiser.job import Job
from imprompt_serving.denoiser.loop import Denoiser
from imprompt_serving.denoiser.policy import CANARY_PRIORITY
from imprompt_serving.denoiser.preview import previews
from imprompt_serving.denoiser.protocol import LoopJob
from imprompt_serving.denoiser.warm_up import warm_up
from imprompt_serving.errors import RequestError, unexpected
from imprompt_serving.gpu import preparation_stream, record_launch
from imprompt_serving.heartbeat import Heart
from imprompt_serving.job_request import Admission, JobRequest
from imprompt_serving.specs import Bundle
from imprompt_serving.triton.internal import warn_if_open, without_secret
from imprompt_serving.triton.metrics import DenoiserMeter, Metrics
from imprompt_serving.triton.tensors import arrays, response, send_final, texts

logger = logging.getLogger(__name__)


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self._heart = Heart(args["model_instance_name"])
        torch.set_num_threads(1)  # torch does little work here; leave the cores to the engines
        # Warnings of libraries about values in requests do not belong in the server's log.
        warnings.filterwarnings("ignore", module=r"(diffusers|numpy|scipy|torchsde)\b")
        diffusers.utils.logging.set_verbosity_error()
        folder = Path(args["model_repository"], args["model_version"])
        bundle = self._bundle = Bundle.load(folder)
        backend = get_backend(bundle.backend)
        device = self._device = backend.device(bundle.denoisers[args["model_name"]])

        def engine(name: str) -> Engine:
            return backend.load(folder / name, threads=bundle.threads, device=str(device))

        call_rows = bundle.shapes.call_rows(bucketed=backend.buckets_rows(str(device)))
        self._conditioner, networks = assemble(bundle, engine, device, call_rows)
        with torch.no_grad():
            warm_up(bundle, self._conditioner, networks, device, call_rows)
        self._metrics = Metrics(metrics.DENOISER, args["model_name"])
        meter = DenoiserMeter(self._metrics)
        self._denoiser = Denoiser(
            networks, Batcher(bundle, call_rows), call_rows, bundle.limits, meter, partial(record_launch, device)
        )
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        self._name = args["model_name"]
        warn_if_open(self._name)
        self._heart.loaded()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            with _refusing(sender):
                self._dispatch(without_secret(arrays(request), self._name), sender)

    def _dispatch(self, tensors: dict[str, np.ndarray], sender: Any) -> None:
        """Prepare jobs on a separate thread, so that cancellations and admissions are never queued behind them."""
        if "job" in tensors:
            request = msgspec.json.decode(tensors.pop("job")[0], type=JobRequest)
            sender = _WatchedSender(sender, self._heart, is_canary=request.settings.priority == CANARY_PRIORITY)
            # Triton blocks a thread of the caller until the first response: send an empty one.
            sender.send(response({}))
            self._preparing.submit(self._accept, request, tensors, sender, time.monotonic())
        elif "cancel" in tensors:
            self._denoiser.cancel(tensors["cancel"][0].decode())
            send_final(sender)
        else:
            admission = msgspec.json.decode(tensors["admit"][0], type=Admission)
            self._denoiser.admit(admission.id, Load(admission.rows, admission.steps, admission.batch_key))
            send_final(sender)

    def _accept(self, request: JobRequest, tensors: dict[str, np.ndarray], sender: Any, received: float) -> None:
        with _refusing(sender, request.id), torch.no_grad(), preparation_stream(self._device):
            self._denoiser.check_not_cancelled(request.id)
            inputs = {name: torch.from_numpy(value) for name, value in tensors.items()}
            job = Job(request, self._bundle, self._conditioner(request, inputs), inputs, self._device)
            bundle = self._bundle
            listener = Listener(
                progress=lambda step, steps, predicted: sender.send(
                    response(_progress(step, steps, predicted, bundle))
                ),
                finish=lambda job: send_final(sender, response(_result(job, received))),
                fail=lambda error: _refuse(sender, error),
            )
            self._denoiser.submit(job, listener)

    def finalize(self) -> None:
        self._preparing.shutdown()
        self._denoiser.stop()
        self._metrics.close()
        self._heart.close()


class _WatchedSender:
    """A response sender that records in the heartbeat what is being sent, and canaries until their final response."""

    def __init__(self, sender: Any, heart: Heart, *, is_canary: bool) -> None:
        self._sender, self._heart = sender, heart
        self._canary = heart.canary.begin() if is_canary else None

    def send(self, *responses: Any, flags: int = 0) -> None:
        with self._heart.sending.one():
            self._sender.send(*responses, flags=flags)
        if flags == pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL:
            self._heart.canary.end(self._canary)


@contextmanager
def _refusing(sender: Any, job_id: str = "without an id") -> Iterator[None]:
    """Send any error raised in the context as the final response."""
    try:
        yield
    except RequestError as error:
        _refuse(sender, error)
    except Exception as error:
        logger.exception("job %s was not accepted", job_id)
        _refuse(sender, unexpected(error))


def _refuse(sender: Any, error: RequestError) -> None:
    """End a job with an error. It is a tensor because Triton turns every error between models into INTERNAL."""
    send_final(sender, response({"error": texts(error.label, str(error))}))


def _progress(step: int, steps: int, predicted: torch.Tensor | None, bundle: Bundle) -> dict[str, np.ndarray]:
    tensors = {"step": np.array([step], np.int32), "steps": np.array([steps], np.int32)}
    if predicted is not None:
        tensors["preview"] = np.array(previews(predicted, bundle), dtype=object)
    return tensors


def _result(job: LoopJob, received: float) -> dict[str, np.ndarray]:
    """Build the response of a finished job that this model `received` at this time (monotonic seconds)."""
    latents = job.result().numpy()
    started = job.started or job.arrived
    timings = {
        "preparation": job.arrived - received,
        "queue": started - job.arrived,
        "denoise": time.monotonic() - started,
    }
    return {
        "latents": latents,
        "timings": texts(json.dumps(timings)),
        "step": np.array([job.steps], np.int32),
        "steps": np.array([job.steps], np.int32),
    }
