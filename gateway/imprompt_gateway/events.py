"""Server-sent events of a request: progress, partial images, and the result, with OpenAI's names."""

from __future__ import annotations

import io
import json
import time
from collections.abc import AsyncGenerator
from typing import Any

from PIL import Image
from starlette.datastructures import State

from imprompt import ImpromptError, InvalidRequest, Progress, Result
from imprompt_gateway.answers import b64, facts, files, size
from imprompt_gateway.errors import failure
from imprompt_gateway.requests import ImageRequest


async def event_stream(
    kind: str,
    request: ImageRequest,
    first: Progress | Result,
    updates: AsyncGenerator[Progress | Result, None],
    state: State,
) -> AsyncGenerator[str, None]:
    """Yield the events of a request of which the `first` update has arrived.

    Args:
        kind: prefix of the event names, `image_generation` or `image_edit`.
        state: of the HTTP request; gets the code of an error, for the log.
    """
    sent = 0
    update = first
    try:
        while isinstance(update, Progress):
            yield _event(f"{kind}.progress", step=update.step, steps=update.steps)
            if update.preview is not None and _is_due(request.partial_images, sent, update):
                file = _encode(update.preview, request.output_format)
                yield _event(f"{kind}.partial_image", partial_image_index=sent, **_picture(file, request.output_format))
                sent += 1
            update = await anext(updates)
        for index, file in enumerate(files(update)):
            yield _event(f"{kind}.completed", index=index, **_picture(file, request.output_format), **facts(update))
    except ImpromptError as error:
        failed = failure(request.in_callers_terms(error) if isinstance(error, InvalidRequest) else error)
        state.error = failed.code
        yield _message("error", failed.body())
    finally:
        await updates.aclose()


def _is_due(wanted: int | None, sent: int, progress: Progress) -> bool:
    """Whether to send the next of `wanted` partial images, which divide the steps into equal parts."""
    return wanted is None or (sent < wanted and progress.step * (wanted + 1) >= (sent + 1) * progress.steps)


def _picture(file: bytes, output_format: str) -> dict[str, Any]:
    return {
        "b64_json": b64(file),
        "background": "opaque",
        "output_format": output_format,
        "quality": "auto",
        "size": size(file),
        "created_at": int(time.time()),
    }


def _encode(preview: Image.Image, output_format: str) -> bytes:
    file = io.BytesIO()
    preview.save(file, output_format)
    return file.getvalue()


def _event(name: str, **values: Any) -> str:
    return _message(name, {"type": name, **values})


def _message(name: str, body: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(body)}\n\n"
