"""Jobs for tests of the denoiser's parts, without a server."""

from __future__ import annotations

from typing import Any

from imprompt_serving.job import JobRequest


def job_request(task: Any = "text-to-image", **changes: Any) -> JobRequest:
    """A small picture of four steps, with other values where ``changes`` says so."""
    given: dict[str, Any] = {
        "id": "job",
        "task": task,
        "height": 64,
        "width": 64,
        "num_inference_steps": 4,
        "guidance_scale": 7.5,
        "seeds": (0,),
    }
    return JobRequest(**given | changes)
