"""Which answers are failures of this project."""

from __future__ import annotations

import re

from fuzz.cases import Case
from fuzz.transports import Answer

MOST_BYTES = 1024
"""Longer messages do not fit beside others into the trailer of a gRPC answer."""
_INTERNAL = {"INTERNAL", "UNKNOWN", "DATA_LOSS", "ServerError", "HTTP 500", "HTTP 501"}
_TRITON_ALONE: tuple[tuple[str, str], ...] = (
    (r"^Unable to parse request$", "the bytes are no message of the protocol"),
    (r'^\{"error":"(Unable|[Ff]ailed) to parse', "JSON that is none, or has values of other types than it declares"),
)
"""Messages with an internal status that Triton gives before anything of this project is called, and why."""
_ADDRESS = re.compile(r"\b0x[0-9a-f]{6,}")
_EXCEPTION = re.compile(r"Traceback|\b[A-Z]\w*(Error|Exception)\b: ")


def verdict(case: Case, answer: Answer, deadline: float) -> str | None:
    """The failure in one word or two; None for an answer as it should be."""
    if answer.seconds >= deadline - 1:
        return "hang"
    if answer.status == "NEIGHBOR":
        return "neighbor harmed"
    if case.forbidden and answer.status in ("OK", "SILENT"):
        return "open to strangers"
    if answer.status == "SILENT":
        # Triton ends a stream without a word when it is sent bytes that are no message.
        return None if case.kind == "flipped" else "silent"
    if case.harmless and answer.status != "OK":
        return "harmless refused"
    if answer.status in _INTERNAL or answer.status == "FOREIGN":
        return None if is_tritons(answer) else "internal"
    if _EXCEPTION.search(answer.message):
        return "internal"
    if answer.status == "RESOURCE_EXHAUSTED" and "metadata" in answer.message:
        return "long message"
    if len(answer.message.encode("utf-8", "replace")) > MOST_BYTES and not is_tritons(answer):
        return "long message"
    return "memory address" if _ADDRESS.search(answer.message) else None


def is_tritons(answer: Answer) -> bool:
    """Whether this is an error of Triton's own about a malformed tensor or message, whatever its status."""
    return answer.status in _INTERNAL and any(re.search(pattern, answer.message) for pattern, _ in _TRITON_ALONE)
