"""Error messages are short, and safe to send and print whatever they quote."""

from __future__ import annotations

import io

import pytest

from imprompt_serving.errors import (
    MAX_MESSAGE_BYTES,
    Cancelled,
    InvalidRequest,
    Overloaded,
    RequestError,
    from_label,
    shown,
)


@pytest.mark.parametrize(
    "text", ["x" * 20_000, "é" * 20_000, "👩" * 600, "\ud83d" * 5000, "\x00" * 5000, "a b\n" * 500]
)
@pytest.mark.parametrize("kind", [RequestError, Overloaded, Cancelled])
def test_long_messages_are_cut(kind: type[RequestError], text: str) -> None:
    for error in (kind(text), InvalidRequest("prompt", text), InvalidRequest(text, "is not a parameter")):
        assert MAX_MESSAGE_BYTES - 16 < len(str(error).encode()) <= MAX_MESSAGE_BYTES
        assert str(error).endswith(" [...]")
        assert str(error).isprintable()


def test_messages_have_no_memory_addresses() -> None:
    message = str(InvalidRequest("image", f"cannot read {io.BytesIO()!r} and {object()!r}"))
    assert message == "image: cannot read <_io.BytesIO object> and <object object>"


def test_short_messages_are_unchanged() -> None:
    message = "ümlaut 猫 👩: must be 1 to 5, got 7; retry in 1.5 s"
    assert str(Overloaded(message)) == message
    passed_on = from_label("INVALID_ARGUMENT InvalidRequest", "seed: one: each")
    assert isinstance(passed_on, InvalidRequest)
    assert (passed_on.parameter, str(passed_on)) == ("seed", "seed: one: each")


@pytest.mark.parametrize(
    "value",
    ["x" * 10_000, 10**9_000, list(range(10_000)), {"a" * 5000: 1}, [[[[[[[[1]]]]]]]], b"\xff" * 9999],
    ids=range(6),
)
def test_quoted_values_are_shortened(value: object) -> None:
    assert len(shown(value)) < 200
