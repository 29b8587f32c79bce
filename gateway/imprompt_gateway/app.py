"""The application: routes, middleware, and what they share."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Mount, Route

from imprompt import AsyncClient
from imprompt_gateway.access import AccessLog, Identify
from imprompt_gateway.auth import RequireKey
from imprompt_gateway.docs_page import docs
from imprompt_gateway.errors import HANDLERS
from imprompt_gateway.health import Readiness, livez, readyz
from imprompt_gateway.images import edits, generations
from imprompt_gateway.limits import LimitBody
from imprompt_gateway.metrics import Measure, Metrics, metrics
from imprompt_gateway.models import list_models, retrieve_model
from imprompt_gateway.openapi import openapi
from imprompt_gateway.pages import PLAYGROUND, docs_css, index

MAX_BODY_BYTES = 64 * 2**20
"""A start picture, a mask, and image prompts of 1024 x 1024 pixels are a few megabytes; base64 adds a third."""

ROUTES = [
    Route("/v1/images/generations", generations, methods=["POST"]),
    Route("/v1/images/edits", edits, methods=["POST"]),
    Route("/v1/models", list_models),
    Route("/v1/models/{name}", retrieve_model),
    Route("/livez", livez),
    Route("/readyz", readyz),
    Route("/metrics", metrics),
    Route("/openapi.json", openapi),
    Route("/docs", docs),
    Route("/docs.css", docs_css),
    Route("/", index),
    Mount("/playground", PLAYGROUND),
]


def create_app(
    client: AsyncClient, *, keys: Sequence[str] = (), max_bytes: int = MAX_BODY_BYTES, health_url: str | None = None
) -> Starlette:
    """Build the application; it closes `client` when it shuts down."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with client:
            yield
        log.close()

    log, measured = AccessLog.from_environment(), Metrics()
    app = Starlette(
        routes=ROUTES,
        middleware=[
            Middleware(Identify, log=log),
            Middleware(Measure, metrics=measured),
            Middleware(RequireKey, keys=keys),
            Middleware(LimitBody, max_bytes=max_bytes),
        ],
        exception_handlers=HANDLERS,
        lifespan=lifespan,
    )
    app.state.client = client
    app.state.readiness = Readiness(client, health_url)
    app.state.metrics = measured
    app.state.max_bytes = max_bytes
    app.state.started = int(time.time())
    return app
