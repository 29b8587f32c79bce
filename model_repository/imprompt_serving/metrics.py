"""The metrics of a bundle's models, beside Triton's own: the one table behind the models and the page on operations."""

from __future__ import annotations

from typing import Literal, NamedTuple

from imprompt_serving.drain import IN_FLIGHT_METRIC

STAGES = {
    "admission": "asking a denoiser for a place in its waiting line",
    "text_encoder": "prompts to tokens to embeddings",
    "preprocess": "image prompts to the input of their encoder",
    "image_encoder": "image prompts to embeddings",
    "face_encoder": "finding faces, and embedding them",
    "vae_encoder": "start pictures to latents",
    "preparation": "in the denoiser: waiting to be prepared, and preparing the job",
    "queue": "in the denoiser: waiting for the first step",
    "denoise": "in the denoiser: all steps",
    "vae_decoder": "latents to pictures",
    "safety_checker": "looking for unsafe pictures",
    "postprocess": "putting a crop back, and writing files",
    "total": "all of it, and what lies between",
}
"""Stages of a request. Those of the encoders overlap; time in which calls of one stage overlap counts once."""

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


class MetricSpec(NamedTuple):
    """A metric; beside ``label`` (with the values it can have) each has the label ``model``."""

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
    "Requests that got their final answer, by status",
    "status",
    ("OK", "INVALID_ARGUMENT", "UNAVAILABLE", "CANCELLED", "INTERNAL"),
)
STAGE_SECONDS = MetricSpec(
    "imprompt_stage_seconds", "HISTOGRAM", "Seconds of each stage of a request", "stage", tuple(STAGES), _SECONDS
)
PIPELINE = (IN_FLIGHT, REQUESTS, STAGE_SECONDS)

JOBS = MetricSpec("imprompt_jobs", "GAUGE", "Denoising jobs, by state", "state", ("running", "waiting"))
ROWS = MetricSpec("imprompt_rows", "GAUGE", "Rows of those jobs, by state", "state", ("running", "waiting"))
TICK_ROWS = MetricSpec("imprompt_tick_rows", "HISTOGRAM", "Rows in each call of the UNet", buckets=_ROWS)
TICK_SECONDS = MetricSpec(
    "imprompt_tick_seconds", "HISTOGRAM", "Seconds of each call, scheduler steps included", buckets=_SECONDS
)
JOBS_ENDED = MetricSpec(
    "imprompt_jobs_ended_total", "COUNTER", "Jobs that ended", "outcome", ("finished", "cancelled", "failed")
)
JOBS_REFUSED = MetricSpec(
    "imprompt_jobs_refused_total",
    "COUNTER",
    "Jobs that the waiting line had no room for, by the limit they met",
    "limit",
    ("rows", "seconds"),
)
DENOISER = (JOBS, ROWS, TICK_ROWS, TICK_SECONDS, JOBS_ENDED, JOBS_REFUSED)
