"""What a pipeline records of a request, for its line in the log and its span: never prompts, pictures, or messages."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from imprompt_serving.errors import InvalidRequest, RequestError
from imprompt_serving.pipeline.request import Request
from imprompt_serving.pipeline.stages import Stages


@dataclass(kw_only=True, slots=True)
class RequestRecord:
    """One request, from its arrival to its final response."""

    id: str
    model: str
    trace_headers: Mapping[str, str]
    """The caller's trace context, as the W3C recommendation names and formats it."""
    began: float = field(default_factory=time.perf_counter)
    stages: Stages = field(default_factory=Stages)
    facts: dict[str, Any] = field(default_factory=dict)
    """What the request asks for, once it is parsed."""
    error: RequestError | None = None

    def parsed(self, request: Request, rows: int) -> None:
        """Record what the request asks for; `rows` is the size of its denoising job."""
        if request.encode_image is not None:
            self.facts = {"task": "encode-image"}
        elif request.encode_prompt:
            self.facts = {"task": "encode-prompt"}
        else:
            self.facts = {
                "task": request.task,
                "pictures": request.pictures,
                "frames": request.frames,
                "height": request.settings.height,
                "width": request.settings.width,
                "steps": request.settings.steps,
                "rows": rows,
            }

    def outcome(self) -> dict[str, Any]:
        """Return how the request ended."""
        if self.error is None:
            return {"status": "OK"}
        parameter = self.error.parameter if isinstance(self.error, InvalidRequest) else None
        return {"status": self.error.status, "error": self.error.name, "parameter": parameter}

    def line(self, *, bundle: str, trace_id: str | None) -> dict[str, Any]:
        """Return the line of a request that has just ended."""
        fields = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "event": "request",
            "request_id": self.id,
            "trace_id": trace_id,
            "bundle": bundle,
            "model": self.model,
            **self.outcome(),
            **self.facts,
            "seconds": round(time.perf_counter() - self.began, 4),
            "stages": {stage: round(seconds, 4) for stage, seconds in self.stages.seconds.items()},
        }
        return {name: value for name, value in fields.items() if value is not None}
