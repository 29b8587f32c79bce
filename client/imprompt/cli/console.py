"""Terminal output shared by the commands, and how errors are reported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from imprompt import ImpromptError

out, err = Console(), Console(stderr=True)

Url = Annotated[str, typer.Option(envvar="IMPROMPT_URL", help="gRPC address of the server, host:port.")]


def fail(message: str, *, status: int = 1) -> NoReturn:
    """Print an error and exit with `status`."""
    err.print(f"[red]error:[/red] {escape(printable(message))}", soft_wrap=True, highlight=False)
    raise typer.Exit(status)


@contextmanager
def reported_errors() -> Iterator[None]:
    """Report errors that the user can act on as a single line, without a traceback."""
    try:
        yield
    except (ImpromptError, ValueError, OSError) as error:
        fail(str(error))


def printable(text: str) -> str:
    """Escape what a terminal cannot show, such as bytes of a file name that are not UTF-8."""
    return text.encode(errors="backslashreplace").decode()
