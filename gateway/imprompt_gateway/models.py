"""`GET /v1/models` and `/v1/models/{name}`."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from imprompt import AsyncClient, InvalidRequest
from imprompt_gateway.errors import UnknownModel


async def list_models(request: Request) -> JSONResponse:
    """List the served bundles with their capabilities."""
    client: AsyncClient = request.app.state.client
    names = await client.models()
    models = await asyncio.gather(*(_describe(request, name) for name in names))
    return JSONResponse({"object": "list", "data": models})


async def retrieve_model(request: Request) -> JSONResponse:
    """Describe one bundle."""
    try:
        return JSONResponse(await _describe(request, request.path_params["name"]))
    except InvalidRequest as error:
        raise UnknownModel(str(error), parameter="model") from error


async def _describe(request: Request, name: str) -> dict[str, Any]:
    state = request.app.state
    capabilities = await state.client.describe(name)
    return {
        "id": name,
        "object": "model",
        "created": state.started,
        "owned_by": "imprompt",
        "capabilities": capabilities,
    }
