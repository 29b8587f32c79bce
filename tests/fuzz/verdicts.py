"""Decide which answers are failures."""

from __future__ import annotations

import re

from fuzz.cases import Case
from fuzz.transports import Answer

MAX_MESSAGE_BYTES = 1024
"""Longer messages may not fit into the trailers of a gRPC response."""
_INTERNAL = {"INTERNAL", "UNKNOWN", "DATA_LOSS", "ServerError", "HTTP 500", "HTTP 501"}
_TRITON_ALONE: tuple[tuple[str, str], ...] = (
    (r"^Unable to parse request$", "the bytes are not a valid message"),
    (r'^\{"error":"(Unable|[Ff]ailed) to parse', "invalid JSON, or values of other types than declared"),
)
"""Messages with an internal status that Triton itself sends before any code of this project runs, and their cause."""
_ADDRESS = re.compile(r"\b0x[0-9a-f]{6,}")
_EXCEPTION = re.compile(r"Traceback|\b[A-Z]\w*(Error|Exception)\b: ")


def verdict(case: Case, answer: Answer, deadline: float) -> str | None:
    """Name the failure in a word or two; None if the answer is acceptable."""
    if answer.seconds >= deadline - 1:
        return "hang"
    if answer.status == "NEIGHBOR":
        return "neighbor harmed"
    if case.forbidden and answer.status in ("OK", "SILENT"):
        return "reachable by callers"
    if answer.status == "SILENT":
        # Triton ends a stream without a message when it receives bytes that are not a valid message.
        return None if case.kind == "flipped" else "silent"
    if case.harmless and answer.status != "OK":
        return "harmless refused"
    if answer.status in _INTERNAL or answer.status == "FOREIGN":
        return None if is_triton_error(answer) else "internal"
    if _EXCEPTION.search(answer.message):
        return "internal"
    if answer.status == "RESOURCE_EXHAUSTED" and "metadata" in answer.message:
        return "long message"
    if len(answer.message.encode("utf-8", "replace")) > MAX_MESSAGE_BYTES and not is_triton_error(answer):
        return "long message"
    return "memory address" if _ADDRESS.search(answer.message) else None


def is_triton_error(answer: Answer) -> bool:
    """Whether Triton itself raised this internal error, for bytes or JSON that it could not parse."""
    return answer.status in _INTERNAL and any(re.search(pattern, answer.message) for pattern, _ in _TRITON_ALONE)
