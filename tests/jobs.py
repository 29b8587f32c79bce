"""Make jobs to test parts of the denoiser without a server."""

from __future__ import annotations

from typing import Any

from imprompt_serving.job_request import JobRequest
from imprompt_serving.parameters import Settings

SMALL: dict[str, Any] = {
    "height": 64,
    "width": 64,
    "num_inference_steps": 4,
    "guidance_scale": 7.5,
    "strength": 1.0,
}


def job_request(task: Any = "text-to-image", **changes: Any) -> JobRequest:
    """Make the request for a small picture; `changes` override its settings or fields."""
    job: dict[str, Any] = {"id": "job", "task": task, "seeds": (0,)}
    job |= {name: changes.pop(name) for name in JobRequest.__struct_fields__ if name in changes}
    return JobRequest(settings=Settings.with_defaults(**SMALL | changes), **job)
