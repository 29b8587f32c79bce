"""`POST /v1/images/generations` and `/v1/images/edits`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from imprompt import AsyncClient, InvalidRequest
from imprompt_gateway.answers import document, file_response
from imprompt_gateway.bodies import read_fields
from imprompt_gateway.events import event_stream
from imprompt_gateway.requests import ImageRequest, read_request

T = TypeVar("T")

_STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""Keep caches and nginx from holding events back."""


async def generations(request: Request) -> Response:
    """Make pictures or a clip."""
    return await _answer(request, kind="image_generation")


async def edits(request: Request) -> Response:
    """Repaint pictures, whole or where a mask says so."""
    return await _answer(request, kind="image_edit", required=("image",))


async def _answer(request: Request, *, kind: str, required: tuple[str, ...] = ()) -> Response:
    client: AsyncClient = request.app.state.client
    fields = await read_fields(request, max_bytes=request.app.state.max_bytes)
    accept = request.headers.get("accept", "")
    wanted = await asyncio.to_thread(read_request, fields, accept=accept, required=("model", "prompt", *required))
    try:
        if wanted.stream:
            return await _stream(request, client, wanted, kind)
        work = client.generate(request_id=request.state.request_id, **wanted.keywords)
        result = await _unless_disconnected(request, work)
    except InvalidRequest as error:
        raise wanted.in_callers_terms(error) from error
    if wanted.as_file:
        return file_response(result, wanted.output_format)
    return JSONResponse(document(result, wanted.output_format))


async def _stream(request: Request, client: AsyncClient, wanted: ImageRequest, kind: str) -> Response:
    """Wait for the first update, so that a request that is refused gets an ordinary error."""
    updates = client.stream(request_id=request.state.request_id, **wanted.keywords)
    first = await _unless_disconnected(request, anext(updates))
    events = event_stream(kind, wanted, first, updates, request.state)
    return StreamingResponse(events, media_type="text/event-stream", headers=_STREAM_HEADERS)


async def _unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """Await `work`, which is canceled when the caller leaves.

    Raises:
        ClientDisconnect: the caller has left.
    """
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
