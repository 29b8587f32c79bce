"""Turn a result into an answer: JSON as OpenAI's API sends it, or the file itself."""

from __future__ import annotations

import base64
import io
import json
import time
from typing import Any

from PIL import Image
from starlette.responses import Response

from imprompt import Result


def b64(data: bytes) -> str:
    """Encode a file for JSON."""
    return base64.b64encode(data).decode()


def size(file: bytes) -> str:
    """Read `WIDTHxHEIGHT` from the header of an encoded picture."""
    with Image.open(io.BytesIO(file)) as image:
        return f"{image.width}x{image.height}"


def files(result: Result) -> list[bytes]:
    """Return the encoded pictures or clips; the gateway always asks for an `output_format`."""
    return result.encoded or []


def facts(result: Result) -> dict[str, Any]:
    """Return what OpenAI's API does not have: the seeds that repeat the pictures, seconds per stage, and warnings."""
    found: dict[str, Any] = {
        "model": result.model,
        "request_id": result.request_id,
        "seeds": result.seeds,
        "timings": result.timings,
        "warnings": result.warnings,
    }
    if result.nsfw_content_detected is not None:
        found["nsfw_content_detected"] = result.nsfw_content_detected
    return found


def document(result: Result, output_format: str) -> dict[str, Any]:
    """Return the JSON answer."""
    return {
        "created": int(time.time()),
        "background": "opaque",
        "output_format": output_format,
        "size": size(files(result)[0]),
        "data": [{"b64_json": b64(file)} for file in files(result)],
        **facts(result),
    }


def file_response(result: Result, output_format: str) -> Response:
    """Return the single picture or clip itself; headers tell its seed and the rest."""
    headers = {
        "Imprompt-Seeds": json.dumps(result.seeds),
        "Imprompt-Timings": json.dumps(result.timings),
        "Imprompt-Warnings": json.dumps(result.warnings),
    }
    return Response(files(result)[0], 200, headers, f"image/{output_format}")
