"""Errors in the form of OpenAI's API: `{"error": {"message", "type", "param", "code"}}` with an HTTP status."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from imprompt import (
    Cancelled,
    ConnectionFailed,
    DeadlineExceeded,
    ImpromptError,
    InvalidRequest,
    Overloaded,
    ServerError,
)

log = logging.getLogger("imprompt.gateway")

RETRY_AFTER_S = 5
"""What callers are told while the server is away; a restart of Triton takes several seconds."""
ID_HEADER = "X-Request-Id"
CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a caller that left; nobody receives it, but it shows in the metrics."""


class UnknownModel(InvalidRequest):
    """The model of a request is not served."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """An error as callers see it."""

    status: int
    message: str
    type: str
    code: str
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        param = None if self.param is None else _printable(self.param)
        error = {"message": _printable(self.message), "type": self.type, "param": param, "code": self.code}
        return {"error": error}

    def response(self) -> Response:
        return JSONResponse(self.body(), self.status, self.headers)


def refuse(parameter: str, problem: str) -> InvalidRequest:
    """Build the error for an invalid parameter; its message starts with the name."""
    return InvalidRequest(f"{parameter}: {problem}", parameter=parameter)


_HTTP_ERRORS = {
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", "forbidden"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("invalid_request_error", "request_timeout"),
    413: ("invalid_request_error", "request_too_large"),
    415: ("invalid_request_error", "unsupported_media_type"),
}
"""Type and code of the errors that are not about a parameter."""


def failure(error: Exception) -> Failure:
    """Describe an exception for callers; what they must not see goes to the log."""
    match error:
        case HTTPException():
            kind, code = _HTTP_ERRORS.get(error.status_code, ("invalid_request_error", "invalid_request"))
            headers = dict(error.headers or {})
            return Failure(status=error.status_code, message=error.detail, type=kind, code=code, headers=headers)
        case UnknownModel():
            return _invalid(error, 404, "model_not_found")
        case InvalidRequest():
            return _invalid(error, 400, "invalid_value")
        case Overloaded() if error.retry_after is not None:
            return _retryable(429, str(error), "rate_limit_error", "queue_full", error.retry_after)
        case Overloaded() | Cancelled():
            return _retryable(503, str(error), "server_error", "unavailable", RETRY_AFTER_S)
        case ConnectionFailed():
            log.warning("%s", error)
            return _retryable(503, "the server cannot be reached", "server_error", "unavailable", RETRY_AFTER_S)
        case DeadlineExceeded():
            return Failure(
                status=504, message=str(error), type="timeout_error", code="deadline_exceeded", param="timeout"
            )
        case ServerError():
            log.error("request %s: %s", error.request_id, error)
            return _internal(f"the server failed; its log has the reason under {error.request_id}")
    return _internal("the gateway failed; its log has the reason")


def _internal(message: str) -> Failure:
    return Failure(status=500, message=message, type="server_error", code="internal_error")


def _invalid(error: InvalidRequest, status: int, code: str) -> Failure:
    return Failure(status=status, message=str(error), type="invalid_request_error", code=code, param=error.parameter)


def _retryable(status: int, message: str, kind: str, code: str, retry_after: float) -> Failure:
    headers = {"Retry-After": str(max(1, math.ceil(retry_after)))}
    return Failure(status=status, message=message, type=kind, code=code, headers=headers)


def _printable(text: str) -> str:
    """Escape lone surrogates, which JSON can carry but UTF-8 cannot."""
    return text.encode(errors="backslashreplace").decode()


async def handle(request: Request, error: Exception) -> Response:
    """Answer an exception that an endpoint raised."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    failed = failure(error)
    request.state.error = failed.code
    response = failed.response()
    # Starlette answers unexpected exceptions outside of all middleware.
    response.headers[ID_HEADER] = request.state.request_id
    return response


HANDLERS: dict[Any, Any] = dict.fromkeys((HTTPException, ImpromptError, ClientDisconnect, Exception), handle)
"""Starlette's exception handlers; it logs whatever reaches the last one."""
