"""Bearer keys for the routes under `/v1/`."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from imprompt_gateway.errors import failure

_PROTECTED = "/v1/"


def read_keys(file: Path) -> tuple[str, ...]:
    """Read keys from a file: one per line; empty lines, and lines that start with `#`, are ignored.

    Raises:
        ValueError: the file has no keys.
        OSError: it cannot be read.
    """
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ValueError(f"{file} has no keys; expected one per line")
    return keys


class RequireKey:
    """ASGI middleware: requests under `/v1/` need one of `keys`.

    Without keys, it only refuses requests that browsers send for pages of other sites.
    """

    def __init__(self, app: ASGIApp, *, keys: Sequence[str]) -> None:
        self._app, self._digests = app, [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._refusal(Headers(scope=scope)) if _is_protected(scope) else None
        answer = self._app if error is None else failure(error).response()
        await answer(scope, receive, send)

    def _refusal(self, headers: Headers) -> HTTPException | None:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if self._digests and not (scheme.lower() == "bearer" and self._is_known(key.strip())):
            message = "a valid API key is required: Authorization: Bearer KEY"
            return HTTPException(401, message, {"WWW-Authenticate": "Bearer"})
        if not self._digests and headers.get("sec-fetch-site") == "cross-site":
            # Browsers let any page send forms to this address, which would be work for the server.
            return HTTPException(403, "pages of other sites need an API key")
        return None

    def _is_known(self, key: str) -> bool:
        """Compare with every key, in a time that does not depend on them."""
        given = _digest(key)
        return sum(hmac.compare_digest(given, digest) for digest in self._digests) > 0


def _is_protected(scope: Scope) -> bool:
    return scope["type"] == "http" and str(scope["path"]).startswith(_PROTECTED)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
