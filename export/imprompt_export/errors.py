"""What an export refuses, in one line that is fit for a terminal."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_LONGEST = 900
"""Bytes of a message: what a user wrote, and what libraries say, is part of some of them."""


class BundleError(ValueError):
    """A bundle that cannot be exported; the message names the key or file and what would be right."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str, longest: int = _LONGEST) -> str:
    """`text` without line breaks and control characters, cut in the middle to `longest` bytes of UTF-8."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    encoded = text.encode(errors="replace")
    if len(encoded) <= longest:
        return encoded.decode()
    half = (longest - 5) // 2
    return f"{encoded[:half].decode(errors='ignore')} ... {encoded[-half:].decode(errors='ignore')}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about `name`: what it may have been meant to be, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""


def some_of(names: Iterable[str], most: int = 5) -> str:
    """The first of `names`, and how many more there are."""
    first, more = list(names)[:most], len(list(names)) - most
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")


def one_of(key: str, value: str, allowed: Iterable[str]) -> str:
    """`value`, which is one of `allowed`.

    Raises:
        BundleError: it is not; the message names `key`.
    """
    if value not in allowed:
        raise BundleError(f"{key}: {value!r} is none of {', '.join(allowed)}")
    return value


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Report whatever a library raises over a file of the user's as a `BundleError` about `what`."""
    try:
        yield
    except BundleError:
        raise
    except Exception as error:  # libraries raise what they like over a file that they do not understand
        reason = one_line(str(error), 300) or type(error).__name__
        raise BundleError(f"{what}: {reason}") from error
