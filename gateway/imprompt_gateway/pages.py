"""The static files, under a strict content security policy: the playground, and the style of `/docs`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles

_FOLDER = Path(__file__).parent
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


async def index(request: Request) -> FileResponse:
    """Serve the playground's page; its other files are under `/playground/`."""
    return FileResponse(_FOLDER / "playground/index.html", headers=SECURITY_HEADERS)


async def docs_css(request: Request) -> FileResponse:
    """Serve the style of `/docs`."""
    return FileResponse(_FOLDER / "docs.css")


class _Playground(StaticFiles):
    def file_response(self, *arguments: Any, **options: Any) -> Response:
        response = super().file_response(*arguments, **options)
        response.headers.update(SECURITY_HEADERS)
        return response


PLAYGROUND = _Playground(directory=_FOLDER / "playground")
