"""The error of an export, and helpers that put its message on one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_LONGEST = 900
"""Maximum bytes of a message: some quote what a user wrote or what a library said."""


class BundleError(ValueError):
    """The bundle cannot be exported. The message names the key or file and says what would be right."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str, longest: int = _LONGEST) -> str:
    """Remove line breaks and control characters, and cut `text` in the middle to `longest` bytes of UTF-8."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    encoded = text.encode(errors="replace")
    if len(encoded) <= longest:
        return encoded.decode()
    half = (longest - 5) // 2
    return f"{encoded[:half].decode(errors='ignore')} ... {encoded[-half:].decode(errors='ignore')}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about `name`: the most similar of `known`, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""


def some_of(names: Iterable[str], most: int = 5) -> str:
    """List the first `most` of `names`, and say how many more there are."""
    first, more = list(names)[:most], len(list(names)) - most
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")


def one_of(key: str, value: str, allowed: Iterable[str]) -> str:
    """Return `value` if it is one of `allowed`.

    Raises:
        BundleError: it is not; the message names `key`.
    """
    if value not in allowed:
        raise BundleError(f"{key}: {value!r} is not one of {', '.join(allowed)}")
    return value


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn any exception that a library raises about a user's file into a `BundleError` about `what`."""
    try:
        yield
    except BundleError:
        raise
    except Exception as error:  # libraries raise all kinds of exceptions for files that they cannot read
        reason = one_line(str(error), 300) or type(error).__name__
        raise BundleError(f"{what}: {reason}") from error
