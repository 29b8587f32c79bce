"""Terminal output shared by the commands, and how errors are reported."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from imprompt import ImpromptError
from imprompt._request import ALL_LISTED

out, err = Console(), Console(stderr=True)

_PHRASES = {
    ALL_LISTED: "`imprompt generate --help` lists them all",
    "or a dict keyed by adapter name": "or NAME=FILE",
}
"""What errors of the Python client say, and how to say it on the command line."""


def fail(message: str, *, status: int = 1) -> NoReturn:
    """Print an error and exit with `status`."""
    err.print(f"[red]error:[/red] {escape(printable(message))}", soft_wrap=True, highlight=False)
    raise typer.Exit(status)


@contextmanager
def reported_errors(context: typer.Context | None = None) -> Iterator[None]:
    """Report errors that the user can act on as a single line, without a traceback.

    With the context of a command, parameters go by the names of its options.
    """
    try:
        yield
    except (ImpromptError, ValueError, OSError) as error:
        fail(str(error) if context is None else _in_words_of_the_command(str(error), context))


def _in_words_of_the_command(message: str, context: typer.Context) -> str:
    """Replace parameters by options of the command: `--control-image` for `control_image`.

    Inside a message, only names with an underscore are unmistakable, and quotes are the user's own words.
    """
    options = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    names = {name: flag for name, flag in options.items() if name and flag.startswith("--")}
    for phrase, replacement in _PHRASES.items():
        message = message.replace(phrase, replacement)
    first, colon, rest = message.partition(":")
    if colon and first in names:
        message = f"{names[first]}:{rest}"
    inside = "|".join(name for name in names if "_" in name)
    if not inside:
        return message
    mention = re.compile(rf"""(?<![\w'"./-])({inside})(?![\w'"./=])""")
    return mention.sub(lambda found: names[found[1]], message)


def check_file(option: str, file: Path) -> None:
    """Fail if `file` could not be written; called before anything is sent."""
    folder = file.absolute().parent
    if not folder.is_dir():
        fail(f"--{option}: no such folder: {file.parent}")
    if file.is_dir() or not os.access(file if file.exists() else folder, os.W_OK):
        fail(f"--{option}: cannot write to {file}")


def print_path(path: Path) -> None:
    """Print the name of a written file, for other programs."""
    out.print(printable(str(path)), soft_wrap=True, highlight=False, markup=False)


def printable(text: str) -> str:
    """Escape what a terminal cannot show, such as bytes of a file name that are not UTF-8."""
    return text.encode(errors="backslashreplace").decode()
