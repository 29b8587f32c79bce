"""Metrics that a bundle's models add to those of Triton: the single source for the models and `docs/operations.md`."""

from __future__ import annotations

from typing import Literal, NamedTuple

from imprompt_serving.drain import IN_FLIGHT_METRIC

STAGES = {
    "admission": "asking a denoiser for a place in its queue",
    "text_encoder": "prompts to tokens to embeddings",
    "preprocess": "image prompts to the inputs of their encoder",
    "image_encoder": "image prompts to embeddings",
    "face_encoder": "finding and embedding faces",
    "vae_encoder": "start pictures to latents",
    "preparation": "in the denoiser: waiting for preparation, and preparing the job",
    "queue": "in the denoiser: waiting for the first step",
    "denoise": "in the denoiser: all steps",
    "vae_decoder": "latents to pictures",
    "safety_checker": "checking for unsafe pictures",
    "postprocess": "pasting back a crop, and encoding files",
    "total": "everything, including the time between stages",
}
"""Stages of a request. The encoder stages overlap; overlapping calls of one stage count once."""

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


class MetricSpec(NamedTuple):
    """A metric. Besides `label`, whose possible values are `values`, every metric has the label `model`."""

    name: str
    kind: Literal["COUNTER", "GAUGE", "HISTOGRAM"]
    doc: str
    label: str | None = None
    values: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


IN_FLIGHT = MetricSpec(IN_FLIGHT_METRIC, "GAUGE", "Requests being served")
REQUESTS = MetricSpec(
    "imprompt_requests_total",
    "COUNTER",
    "Requests that received their final response, by status",
    "status",
    ("OK", "INVALID_ARGUMENT", "UNAVAILABLE", "CANCELLED", "INTERNAL"),
)
STAGE_SECONDS = MetricSpec(
    "imprompt_stage_seconds", "HISTOGRAM", "Seconds of each stage of a request", "stage", tuple(STAGES), _SECONDS
)
SHARED_CACHE = MetricSpec(
    "imprompt_shared_cache_total",
    "COUNTER",
    "Encoder calls with a shared cache, by outcome",
    "outcome",
    ("hit", "miss", "error", "skipped"),
)
PIPELINE = (IN_FLIGHT, REQUESTS, STAGE_SECONDS, SHARED_CACHE)

JOBS = MetricSpec("imprompt_jobs", "GAUGE", "Denoising jobs, by state", "state", ("running", "waiting"))
ROWS = MetricSpec("imprompt_rows", "GAUGE", "Rows of these jobs, by state", "state", ("running", "waiting"))
TICK_ROWS = MetricSpec("imprompt_tick_rows", "HISTOGRAM", "Rows in each call of the UNet", buckets=_ROWS)
TICK_SECONDS = MetricSpec(
    "imprompt_tick_seconds", "HISTOGRAM", "Seconds of each call, including scheduler steps", buckets=_SECONDS
)
JOBS_ENDED = MetricSpec(
    "imprompt_jobs_ended_total", "COUNTER", "Jobs that ended", "outcome", ("finished", "cancelled", "failed")
)
JOBS_REFUSED = MetricSpec(
    "imprompt_jobs_refused_total",
    "COUNTER",
    "Jobs refused because the queue was full, by the limit they exceeded",
    "limit",
    ("rows", "seconds"),
)
DENOISER = (JOBS, ROWS, TICK_ROWS, TICK_SECONDS, JOBS_ENDED, JOBS_REFUSED)
